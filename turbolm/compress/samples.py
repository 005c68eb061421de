"""Calibration data: the user's text as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import ConfigError, RequestError, TemplateError
from turbolm.models.checkpoint import Checkpoint
from turbolm.text import ChatTemplate, Tokenizer, encode_chat, load_tokenizer, tokenizer_from_gguf

SHIPPED = Path(__file__).parent / "calibration.jsonl"
_DATASET = "hf:"
_FEW_TOKENS = 4096  # fewer say too little about the activations
_COMPLETIONS = ("completion", "response", "answer", "output")


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids of each sample."""

    token_ids: tuple[tuple[int, ...], ...]
    source: str  # as in messages
    warnings: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The model's own."""
    if checkpoint.gguf is not None:
        return tokenizer_from_gguf(checkpoint.gguf.metadata)
    return load_tokenizer(checkpoint.path)


def load_samples(data: str, tokenizer: Tokenizer, max_samples: int, context: int) -> Samples:
    """Up to `max_samples` samples of up to `context` tokens, evenly spread over the data.

    `data`: a .jsonl file, each line an object with "messages" (rendered by the model's chat template),
    "prompt" (and "completion"), or "text"; any other file is plain text; "hf:name[:split]" is a dataset of
    such rows (needs the package datasets); empty: the text that comes with turbolm.
    Raises ConfigError for data that can't be used, naming the line.
    """
    warnings: list[str] = []
    if data.startswith(_DATASET):
        samples = _rows(_dataset_rows(data, max_samples), tokenizer, data, warnings)
    else:
        path = Path(data).expanduser() if data else SHIPPED
        text = _read(path)
        if path.suffix == ".jsonl":
            samples = _rows(_json_rows(path, text), tokenizer, path.name, warnings)
        elif path.suffix == ".json":
            raise ConfigError(f"{path}: JSON data must be one object per line, in a .jsonl file")
        else:
            samples = _pieces(tokenizer.encode(text, add_special=False), context)
    samples = [sample[:context] for sample in samples if len(sample) > 1]
    if not samples:
        raise ConfigError(f"{data or SHIPPED} holds no text to calibrate with")
    kept = _spread(samples, max_samples)
    source = data or "the text that comes with turbolm"
    result = Samples(tuple(tuple(sample) for sample in kept), source)
    if data and len(kept) < max_samples:
        warnings.append(f"{source} has {len(kept)} samples; {max_samples} were asked for")
    if result.num_tokens < _FEW_TOKENS:
        warnings.append(
            f"calibration with {result.num_tokens} tokens only: give more data, {_FEW_TOKENS} tokens or more"
        )
    return Samples(result.token_ids, source, tuple(warnings))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read the calibration data {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error})") from None


def _spread(samples: list[list[int]], count: int) -> list[list[int]]:
    """`count` of them, evenly spaced."""
    if len(samples) <= count:
        return samples
    return [samples[index * len(samples) // count] for index in range(count)]


def _pieces(token_ids: list[int], context: int) -> list[list[int]]:
    pieces = [token_ids[start : start + context] for start in range(0, len(token_ids), context)]
    # A short rest says little, and is half of very little text.
    return pieces[:-1] if len(pieces) > 1 and len(pieces[-1]) < context // 2 else pieces


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is not valid JSON ({error})") from None


def _dataset_rows(data: str, max_samples: int) -> Iterator[tuple[str, object]]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(f"{data} needs the package datasets: pip install datasets") from None
    name, _, split = data.removeprefix(_DATASET).partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"can't load {data}: {error}") from None
    for number, row in enumerate(rows.take(max_samples), 1):
        yield f"{data}, row {number}", row


def _rows(
    rows: Iterator[tuple[str, object]], tokenizer: Tokenizer, source: str, warnings: list[str]
) -> list[list[int]]:
    template = ChatTemplate.of(tokenizer) if tokenizer.chat_templates else None
    samples, num_plain = [], 0
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(f"{place}: each line must be an object with 'messages', 'prompt' or 'text'")
        messages = row.get("messages")
        if messages is None:
            samples.append(tokenizer.encode(_text(row, place)))
        elif template is None:
            num_plain += 1
            samples.append(tokenizer.encode("\n\n".join(_contents(messages, place))))
        else:
            samples.append(_encode_chat(tokenizer, template, messages, place))
    if num_plain:
        warnings.append(f"{source}: the model has no chat template; {num_plain} conversations were taken as plain text")
    return samples


def _encode_chat(tokenizer: Tokenizer, template: ChatTemplate, messages: Any, place: str) -> list[int]:
    try:
        return encode_chat(tokenizer, template, messages, add_generation_prompt=False)
    except (RequestError, TemplateError) as error:
        raise ConfigError(f"{place}: {error}") from None


def _text(row: Mapping[str, object], place: str) -> str:
    if "text" in row:
        parts = [row["text"]]
    elif "prompt" in row:
        parts = [row["prompt"], *(row[name] for name in _COMPLETIONS if name in row)]
    else:
        found = ", ".join(map(str, row)) or "nothing"
        raise ConfigError(f"{place} has {found}; it needs 'messages', 'prompt' or 'text'")
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{place}: 'prompt' and 'text' must be strings")
    return "\n".join(str(part) for part in parts)


def _contents(messages: object, place: str) -> list[str]:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise ConfigError(f"{place}: 'messages' must be a list of objects with 'role' and 'content'")
    return [str(message.get("content", "")) for message in messages]
