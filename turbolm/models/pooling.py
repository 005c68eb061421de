"""How a checkpoint's makers turn hidden states into one vector: what its sentence-transformers files, or its GGUF
metadata, say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turbolm.errors import CheckpointError
from turbolm.models.checkpoint import Checkpoint
from turbolm.types import Pooling

_MODULES = "modules.json"
_SERVED_MODULES = ("Transformer", "Pooling", "Normalize")
_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean"}
_OLD_PREFIX = "pooling_mode_"  # one flag per mode, such as pooling_mode_mean_tokens
_GGUF_TYPES = ("none", "mean", "cls", "last", "rank")  # of the metadata's pooling_type
_GGUF_POOLINGS: dict[str, Pooling] = {"none": "last", "mean": "mean", "last": "last"}


class PoolingChoice(NamedTuple):
    """What a text's embedding is, where nobody says otherwise."""

    pooling: Pooling = "last"
    reason: str = "nothing else is said in the checkpoint"
    refusal: str | None = None
    """Why no embeddings can be had: the makers' own are computed in a way that turbolm doesn't have."""


def choose_pooling(checkpoint: Checkpoint) -> PoolingChoice:
    """Raises CheckpointError for files that can't be read."""
    if checkpoint.gguf is not None:
        return _of_gguf(checkpoint.gguf.metadata)
    if (checkpoint.path / _MODULES).is_file():
        return _of_modules(checkpoint.path)
    return PoolingChoice()


def _of_gguf(metadata: Mapping[str, Any]) -> PoolingChoice:
    number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    if number is None:
        return PoolingChoice()
    name = _GGUF_TYPES[number] if number in range(len(_GGUF_TYPES)) else str(number)
    reason = f"the GGUF file's pooling_type is {name}"
    if name not in _GGUF_POOLINGS:
        return PoolingChoice(reason=reason, refusal=f"{reason}, which turbolm doesn't have (it has last and mean)")
    return PoolingChoice(_GGUF_POOLINGS[name], reason)


def _of_modules(folder: Path) -> PoolingChoice:
    modules = _read_json(folder / _MODULES, list)
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    unknown = [kind for kind in kinds if kind not in _SERVED_MODULES]
    if unknown:
        return PoolingChoice(refusal=f"{_MODULES} has a module of type {unknown[0]!r}, which turbolm doesn't have")
    if "Pooling" not in kinds:
        return PoolingChoice()
    path = folder / str(kinds["Pooling"].get("path", "")) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder / _MODULES} tells of {path}, and there is no such file: download the model again"
        )
    config = _read_json(path, dict)
    given = config.get("pooling_mode")
    modes = [given] if given else [n.removeprefix(_OLD_PREFIX) for n, v in config.items() if v is True and _is_mode(n)]
    names = [str(mode).removesuffix("_tokens").removesuffix("_token") for mode in modes]
    reason = f"{path.parent.name}/{path.name} says {' and '.join(names) or 'nothing'}"
    if len(names) != 1 or names[0] not in _MODES:
        return PoolingChoice(reason=reason, refusal=f"{reason}, which turbolm doesn't have (it has lasttoken and mean)")
    return PoolingChoice(_MODES[names[0]], reason)


def _is_mode(name: str) -> bool:
    return name.startswith(_OLD_PREFIX)


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}); download it again") from error
    entries = value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path} holds something else than expected; download it again")
    return value
