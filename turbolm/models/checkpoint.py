"""A model on disk, opened: its config, and where its weights are. Reads headers, no weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError, UserError
from turbolm.models.converted import Manifest, rank_folder, read_manifest
from turbolm.models.gguf import GGUFFile
from turbolm.models.gguf_config import gguf_config, gguf_generation_config
from turbolm.models.gguf_source import GGUFSource
from turbolm.models.safetensors import SafetensorsSource
from turbolm.quant import read_packing
from turbolm.weights import Packing, WeightSource

_GPTQ_NAME = "quantize_config.json"
_LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files."""

    path: Path  # the folder, or the (first) GGUF file
    config: dict[str, Any]  # as in Hugging Face's config.json
    generation_config: dict[str, Any]  # as in generation_config.json; empty where there is none
    source: WeightSource
    gguf: GGUFFile | None  # the file where it is one: its metadata have the tokenizer
    packing: Packing | None = None  # of quantized matrices, where they are not GGUF's
    manifest: Manifest | None = None  # of a model that was converted; `source` is its first rank's

    @property
    def total_weight_bytes(self) -> int:
        """All tensors as they are stored."""
        return sum(info.num_bytes for info in self.source.tensors.values())


def refuse_converted(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError for a model that `turbolm convert` wrote: its matrices are a backend's."""
    if checkpoint.manifest is not None:
        raise UnsupportedModelError(
            f"{checkpoint.path} was converted to the layout of turbolm's kernels: give the model that it was made of "
            f"({checkpoint.manifest.source})"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """`path`: a folder with config.json and safetensors files, a folder with one GGUF model (or the
    parts of one), or a .gguf file.

    Raises ModelNotFoundError where nothing is there, CheckpointError for missing or broken files,
    UnsupportedModelError for formats and architectures that turbolm doesn't serve.
    """
    path = path.expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is no model: give a folder with config.json, or a .gguf file")
        return _open_gguf(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"there is no file or folder {path}")
    gguf_names = sorted(file.name for file in path.glob("*.gguf") if not _LATER_PART.fullmatch(file.name))
    if gguf_names and not any(path.glob("*.safetensors")):
        if len(gguf_names) > 1:
            raise CheckpointError(
                f"{path} has {len(gguf_names)} GGUF models; give the path of one: {', '.join(gguf_names[:8])}"
            )
        return _open_gguf(path / gguf_names[0])
    return _open_folder(path)


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    return Checkpoint(file.path, gguf_config(file), gguf_generation_config(file), GGUFSource(file), file)


def _open_folder(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; a model's folder needs it next to the weights")
    config = _read_json(path / "config.json")
    generation_path = path / "generation_config.json"
    generation_config = _read_json(generation_path) if generation_path.is_file() else {}
    manifest = read_manifest(path)
    if manifest is not None:
        source = SafetensorsSource(rank_folder(path, 0))
        return Checkpoint(path, config, generation_config, source, None, manifest=manifest)
    return Checkpoint(path, config, generation_config, SafetensorsSource(path), None, _read_packing(path, config))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return value


def _read_packing(path: Path, config: dict[str, Any]) -> Packing | None:
    """How the folder's matrices are packed; None where they are not quantized. Old GPTQ checkpoints say it in a file
    of its own."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization and (path / _GPTQ_NAME).is_file():
        quantization = {"quant_method": "gptq", **_read_json(path / _GPTQ_NAME)}
    if not quantization:
        return None
    try:
        return read_packing(quantization)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
