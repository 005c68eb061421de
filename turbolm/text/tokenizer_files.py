"""Tokenizers from model folders in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from turbolm.errors import CheckpointError, ModelNotFoundError
from turbolm.text.sentencepiece import CONTROL, UNUSED, USER_DEFINED, Pieces, Prefix, build_backend, read_pieces
from turbolm.text.tokenizer import Tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NEEDED = ("bos_token", "eos_token", "unk_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, or else `tokenizer.model` (SentencePiece),
    completed by tokenizer_config.json, special_tokens_map.json, added_tokens.json and
    chat_template.jinja. Raises ModelNotFoundError where there is none, CheckpointError where files
    are broken, UnsupportedModelError for other kinds of tokenizers."""
    folder = Path(folder)
    config = {**_read_object(folder / "special_tokens_map.json"), **_read_object(folder / "tokenizer_config.json")}
    added = _added_tokens(config, _read_object(folder / "added_tokens.json"))
    roles = {role: _content(config[role]) for role in _ROLES if config.get(role)}
    flags = (config.get("add_bos_token"), config.get("add_eos_token"))
    frame = (bool(flags[0]), bool(flags[1])) if flags != (None, None) else None
    if (folder / "tokenizer.json").is_file():
        backend = _read_backend(folder / "tokenizer.json")
        _add_missing(backend, added)
    elif (folder / "tokenizer.model").is_file():
        pieces = _with_added(read_pieces((folder / "tokenizer.model").read_bytes()), added)
        backend = build_backend(pieces, _prefix(config, pieces))
        for role, token_id in (("bos_token", pieces.bos_id), ("eos_token", pieces.eos_id)):
            if token_id is not None:
                roles.setdefault(role, pieces.texts[token_id])
        roles.setdefault("unk_token", pieces.texts[pieces.unknown_id])
        frame = (flags[0] is None or bool(flags[0]), bool(flags[1]))
    else:
        raise ModelNotFoundError(
            f"{folder} has no tokenizer: it needs a tokenizer.json, or a tokenizer.model (SentencePiece)"
        )
    # Padding and the like don't matter here: not worth a token that the model has no weights for.
    roles = {r: t for r, t in roles.items() if r in _NEEDED or backend.token_to_id(t) is not None}
    _add_special(backend, [*roles.values(), *_extra_tokens(config)])
    return Tokenizer(backend, special_tokens=roles, chat_templates=_chat_templates(folder, config), frame=frame)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected is a JSON object")
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for this
        raise CheckpointError(f"{path} can't be read ({error}): download it again") from error


def _content(token: object) -> str:
    """The text of a token as configs give it: a string, or an object with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"tokenizer_config.json: {token!r} is no token; expected is a string")
    return text


def _added_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, in order: those of tokenizer_config.json, or of the older added_tokens.json."""
    added: dict[int, AddedToken] = {}
    try:
        for text, token_id in legacy.items():
            added[int(token_id)] = AddedToken(text, normalized=False)
        for token_id, token in (config.get("added_tokens_decoder") or {}).items():
            names = ("lstrip", "rstrip", "single_word", "normalized", "special")
            options = {name: bool(token[name]) for name in names if name in token}
            added[int(token_id)] = AddedToken(_content(token), **options)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the added tokens in tokenizer_config.json are malformed: {error}") from error
    return dict(sorted(added.items()))


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    extra: list[str] = []
    for name in _EXTRA:
        value = config.get(name) or ()
        extra += [_content(token) for token in (value.values() if isinstance(value, dict) else value)]
    return extra


def _add_missing(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> None:
    known = backend.get_added_tokens_decoder()
    missing = {i: token for i, token in added.items() if i not in known}
    if missing:
        backend.add_tokens(list(missing.values()))
    for token_id, token in missing.items():
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"tokenizer_config.json gives the token {token.content!r} the id {token_id}, "
                f"tokenizer.json {backend.token_to_id(token.content)}: the files don't belong together"
            )


def _add_special(backend: tokenizers.Tokenizer, texts: list[str]) -> None:
    """Makes the named tokens control tokens, where they are not yet."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    new = [AddedToken(text, normalized=False, special=True) for text in dict.fromkeys(texts) if text not in known]
    if new:
        backend.add_special_tokens(new)


def _with_added(pieces: Pieces, added: Mapping[int, AddedToken]) -> Pieces:
    """`pieces` with added tokens in their places: after the end, or instead of reserved pieces."""
    texts, scores, types = list(pieces.texts), list(pieces.scores), list(pieces.types)
    for token_id, token in added.items():
        for gap in range(len(texts), token_id + 1):
            texts.append(f"<|unassigned_{gap}|>")
            scores.append(0.0)
            types.append(UNUSED)
        texts[token_id] = token.content
        types[token_id] = CONTROL if token.special else USER_DEFINED
    return replace(pieces, texts=texts, scores=scores, types=types)


def _prefix(config: Mapping[str, Any], pieces: Pieces) -> Prefix:
    """Where a space goes before text. Llama's class has a rule of its own, with a switch for its
    old rule; others leave it to SentencePiece."""
    if not config.get("add_prefix_space", pieces.add_prefix):
        return "never"
    name = str(config.get("tokenizer_class", "LlamaTokenizer"))
    if name.removesuffix("Fast") != "LlamaTokenizer":
        return "segment"
    return "always" if config.get("legacy", False) else "first"


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files go before the config's entry."""
    templates = read_templates(config.get("chat_template"))
    path = folder / "chat_template.jinja"
    if path.is_file():
        templates = {**templates, "default": _read_text(path)}
    extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {**templates, **{path.stem: _read_text(path) for path in extra}}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error})") from error


def read_templates(value: object) -> dict[str, str]:
    """Templates by name from a config's "chat_template": one source ("default"), a list of
    {"name", "template"}, or a mapping. Raises CheckpointError for anything else."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        return dict(value)
    raise CheckpointError("tokenizer_config.json: chat_template must be a string or a list of {name, template}")
