"""A model, known by its headers: from local files, a config.json alone, or a repository's headers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from turbolm import hub
from turbolm.engine.build import model_needs
from turbolm.errors import CheckpointError, ModelNotFoundError
from turbolm.hub import LocalName, RepositoryName
from turbolm.memory import ModelNeeds
from turbolm.models.checkpoint import Checkpoint, open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.models.spec import DecoderSpec
from turbolm.planner.headers import copy_headers
from turbolm.quant import read_packing
from turbolm.weights import TensorInfo

#: Per weight of a checkpoint's layers, the larger first; int4 with 16 bits for each group of 128.
_STORED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}


@dataclass(frozen=True, slots=True)
class PlannedModel:
    name: str
    given: str  # as the user named it
    checkpoint: Checkpoint
    spec: DecoderSpec
    is_shape: bool  # without weights: their number follows from the spec

    def needs(self, tensor_parallel: int) -> ModelNeeds:
        """Of each GPU. ConfigError where so many can't divide the model."""
        needs = model_needs(self.name, self.checkpoint, self.spec, tensor_parallel)
        if not self.is_shape:
            return needs
        rate = next((_STORED_BYTES[name] for name in _STORED_BYTES if name in needs.packed), 2.0)
        rest = needs.num_parameters - needs.layer_parameters
        return replace(needs, packed_bytes=int(needs.layer_parameters * rate) + rest * 2)

    @property
    def num_parameters(self) -> int:
        return self.needs(1).num_parameters

    @property
    def is_packed(self) -> bool:
        return bool(self.needs(1).packed)


def open_model(name: str) -> PlannedModel:
    """`name`: as everywhere, or the path of a config.json, or of a folder with nothing else.

    Raises ModelNotFoundError, DownloadError, CheckpointError, UnsupportedModelError.
    """
    path = Path(name).expanduser()
    shape = path / "config.json" if path.is_dir() else path
    has_weights = path.is_dir() and any(file.suffix in (".safetensors", ".gguf") for file in path.iterdir())
    if shape.suffix == ".json" and shape.is_file() and not has_weights:
        return _shape(name, shape)
    model = hub.resolve(name)
    if not isinstance(model, LocalName) and not hub.is_cached(name):
        return _remote(name, model)
    local = hub.fetch(name, progress=False, offline=True)
    return _opened(_short(model), name, open_checkpoint(local.path))


def _opened(title: str, given: str, checkpoint: Checkpoint) -> PlannedModel:
    return PlannedModel(title, given, checkpoint, decoder_spec(checkpoint.config), is_shape=False)


def _remote(name: str, model: hub.ModelName) -> PlannedModel:
    if not isinstance(model, RepositoryName) or model.source != "hf":
        raise ModelNotFoundError(
            f"'{name}' isn't here, and headers alone can be read from the Hugging Face Hub only; fetch it first "
            f"(turbolm models pull {name}), or give its config.json"
        )
    remote = hub.locate_huggingface(model)
    with tempfile.TemporaryDirectory(prefix="turbolm-plan-") as folder:
        copy_headers(remote.sizes, remote.urls, remote.headers, Path(folder))
        return _opened(_short(model), name, open_checkpoint(Path(folder) / remote.main))


def _short(model: hub.ModelName) -> str:
    if isinstance(model, LocalName):
        return model.path.stem if model.path.suffix == ".gguf" else model.path.name
    return model.repository.rpartition("/")[2] if isinstance(model, RepositoryName) else str(model)


def _shape(given: str, path: Path) -> PlannedModel:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"can't read {path} ({error}); give a model's config.json") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; give a model's config.json")
    quantization = config.get("quantization_config") or config.get("compression_config")
    packing = read_packing(quantization) if quantization else None
    title = path.resolve().parent.name if path.name == "config.json" else path.stem
    checkpoint = Checkpoint(path, config, {}, _NoWeights(), None, packing)
    return PlannedModel(title, given, checkpoint, decoder_spec(config), is_shape=True)


class _NoWeights:
    """A `WeightSource` of nothing."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}

    def read(self, name: str) -> Tensor:
        raise CheckpointError(f"a config.json has no tensor {name}")

    def release(self, name: str) -> None:
        pass
