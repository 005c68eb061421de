"""SentencePiece vocabularies (Llama 2, InternLM 2, Yi, Mistral 7B …) as `tokenizers` backends.

Both a `tokenizer.model` file and a GGUF file's metadata give the same thing: pieces with scores and
types. Merging follows the scores, best first, as SentencePiece does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from turbolm.errors import CheckpointError, UnsupportedModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, numbered alike in `tokenizer.model` and GGUF."""

Prefix = Literal["never", "segment", "first", "always"]
"""Where a space is put before text. "segment": before each text between control tokens, as
SentencePiece does. "always" and "first": the same before each and before the first alone, but not
where the text begins with a space, as transformers does."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary: equally long columns, indexed by token id."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unknown_id: int = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None
    add_prefix: bool = True
    collapse_spaces: bool = False
    charsmap: bytes = b""  # compiled normalization rules


def build_backend(pieces: Pieces, prefix: Prefix) -> tokenizers.Tokenizer:
    """The backend of a BPE vocabulary. Raises CheckpointError where pieces repeat."""
    vocab = unique_vocab(pieces.texts)
    special = {
        text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind not in (NORMAL, USER_DEFINED)
    }
    has_bytes = BYTE in pieces.types
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            score_merges(vocab, pieces.scores, special),
            unk_token=pieces.texts[pieces.unknown_id],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.collapse_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if prefix in ("never", "segment"):
        steps += [normalizers.Prepend("▁")] if prefix == "segment" else []
        steps.append(normalizers.Replace(" ", "▁"))
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never":
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    add_tokens(backend, pieces.texts, pieces.types)
    return backend


def add_tokens(backend: tokenizers.Tokenizer, texts: Sequence[str], types: Iterable[int]) -> None:
    """Makes control and user-defined tokens ones that are matched whole."""
    added = [
        AddedToken(texts[i], normalized=False, special=kind == CONTROL)
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    if added:
        backend.add_tokens(added)


def unique_vocab(texts: Sequence[str]) -> dict[str, int]:
    """Token → id. Raises CheckpointError where a token occurs twice."""
    vocab = {text: i for i, text in enumerate(texts)}
    if len(vocab) != len(texts):
        seen: dict[str, int] = {}
        for i, text in enumerate(texts):
            if text in seen:
                raise CheckpointError(f"the vocabulary has the token {text!r} twice, as ids {seen[text]} and {i}")
            seen[text] = i
    return vocab


def score_merges(vocab: dict[str, int], scores: Sequence[float], skip: set[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best piece first; among the ways of one
    piece the longest left part first. Pieces in `skip` take no part."""
    usable = vocab.keys() - skip
    ranked = [
        (-scores[vocab[text]], vocab[text], -cut, text)
        for text in usable
        if len(text) > 1
        for cut in range(1, len(text))
        if text[:cut] in usable and text[cut:] in usable
    ]
    ranked.sort()
    return [(text[:-cut], text[-cut:]) for _, _, cut, text in ranked]


def read_pieces(data: bytes) -> Pieces:
    """The pieces of a `tokenizer.model` file (a serialized `sentencepiece.ModelProto`).
    Raises CheckpointError for a broken file, UnsupportedModelError for a model that is not BPE."""
    try:
        return _read_model(data)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"the SentencePiece model is broken or truncated ({error}): download tokenizer.model again"
        ) from error


def _read_model(data: bytes) -> Pieces:
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    rules: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_message(value)))
            texts.append(_message(piece[1]).decode())
            scores.append(struct.unpack("<f", _message(piece.get(2, bytes(4))))[0])
            types.append(int(piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            rules = dict(_fields(_message(value)))
    if not texts:
        raise ValueError("no pieces")
    algorithm = trainer.get(3, 1)
    if algorithm != 2:
        name = {1: "unigram", 3: "word", 4: "character"}.get(int(algorithm), str(algorithm))
        raise UnsupportedModelError(f"a SentencePiece model of the kind '{name}' is not supported; supported is BPE")

    def token(field: int, default: int) -> int | None:
        number = int(trainer.get(field, default))
        return number if 0 <= number < len(texts) else None  # -1, as 64-bit two's complement: none

    return Pieces(
        texts,
        scores,
        types,
        unknown_id=token(40, 0) or 0,
        bos_id=token(41, 1),
        eos_id=token(42, 2),
        pad_id=token(43, len(texts)),
        add_prefix=bool(rules.get(3, 1)),
        collapse_spaces=bool(rules.get(4, 1)),
        charsmap=_message(rules.get(2, b"")),
    )


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of a protocol-buffer message; of fixed-width values, their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown field kind {kind}")
        if at + size > len(data):
            raise ValueError("it ends early")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
