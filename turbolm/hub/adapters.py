"""The files of LoRA adapters, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path

from turbolm.errors import ModelNotFoundError
from turbolm.hub.huggingface import fetch_files
from turbolm.hub.names import LocalName, RepositoryName, resolve

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fetch_adapter(name: str) -> Path:
    """The folder with an adapter's files: a folder of this machine, or of org/name or hf:org/name[@revision].

    Raises ModelNotFoundError, DownloadError."""
    found = resolve(name)
    if isinstance(found, LocalName):
        if not (found.path / _CONFIG).is_file():
            raise ModelNotFoundError(f"'{name}' is no adapter: give a folder with {_CONFIG} and {_WEIGHTS}")
        return found.path
    if not isinstance(found, RepositoryName) or found.source != "hf" or found.file is not None:
        raise ModelNotFoundError(f"'{name}' is no adapter's name: give a folder, org/name or hf:org/name[@revision]")
    folder = fetch_files(found, (_CONFIG, _WEIGHTS))
    if not (folder / _CONFIG).is_file():
        raise ModelNotFoundError(f"'{name}' holds no adapter: there is no {_CONFIG}")
    return folder
