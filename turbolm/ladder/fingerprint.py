"""Hashes that say which model, data and software a result belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHOLE = 64 << 20  # bytes of a file that are hashed whole; of larger ones, pieces spread over it
_NUM_PIECES = 64
_PIECE = 1 << 20
_SUFFIXES = (".safetensors", ".gguf", ".json", ".model", ".jinja", ".txt")


def model_fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes and contents of a model's files (of large ones: 64 pieces of 1 MiB, so that a
    model of any size takes seconds)."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for number in range(_NUM_PIECES):
                stream.seek((size - _PIECE) * number // (_NUM_PIECES - 1))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def content_hash(content: Mapping[str, Any] | list[Any]) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
