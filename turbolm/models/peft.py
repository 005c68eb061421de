"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

The config is read strictly: a field that turbolm doesn't know must say nothing, or else the adapter is refused by the
field's name. So are tensors that the config doesn't account for, or that don't fit the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.layers.linear import LowRank
from turbolm.models.mapped_file import MappedFile
from turbolm.models.safetensors import DTYPES, read_header
from turbolm.models.spec import DecoderSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1024

# Fields that don't change what the adapter computes at inference.
_SILENT = frozenset([
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config",
    "ensure_weight_tying", "target_modules", "exclude_modules", "layers_to_transform", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
])  # fmt: skip
# Ways to begin training that change the base model's weights, too, in what is saved.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter adds to which modules, by the checkpoint's names. Its tensors are views of the file."""

    path: Path
    modules: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(own.rank for own in self.modules.values())


def module_shapes(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """[n, k] of each matrix in the layers, by name: those that adapters may add to."""
    found: dict[str, tuple[int, int]] = {}
    for layer in spec.layers:
        attention, names, mlp, hidden = layer.attention, layer.attention_names, layer.mlp, spec.hidden_size
        kv_rows = (attention.num_kv_heads * attention.head_dim, attention.num_kv_heads * attention.v_head_dim)
        rows = (attention.q_width, *kv_rows) if len(names.qkv) > 1 else (attention.qkv_width,)
        found |= {name: (size, hidden) for name, size in zip(names.qkv, rows, strict=True)}
        found[names.output] = (hidden, attention.num_heads * attention.v_head_dim)
        found |= {mlp.gate: (mlp.width, hidden), mlp.up: (mlp.width, hidden), mlp.down: (hidden, mlp.width)}
    return found


def read_adapter(folder: Path, spec: DecoderSpec) -> Adapter:
    """The adapter in a folder, checked against the model that it is for. Raises CheckpointError for files that are
    broken or don't fit, UnsupportedModelError for what turbolm doesn't compute."""
    shapes = module_shapes(spec)
    config = _Config(folder / CONFIG)
    targets = config.targets(shapes, {spec.embedding, "lm_head", *([spec.head] if spec.head else [])})
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has its weights only as a pickle (adapter_model.bin), which can run code when it is loaded; "
            "save it with safetensors (PEFT's save_pretrained does)"
        )
    file = MappedFile(path)
    header = {info.name: (info, offset) for info, offset in read_header(file)}
    for name in header:
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in targets:
            raise CheckpointError(
                f"{path}: the tensor {name} is of none of the modules that {CONFIG} targets in this model"
                + _hint(name, shapes)
            )

    def tensor(module: str, side: str, shape: tuple[int, int]) -> torch.Tensor:
        name = f"base_model.model.{module}.lora_{side}.weight"
        if name not in header:
            raise CheckpointError(f"{path} lacks the tensor {name}, which {CONFIG} implies; the file is incomplete")
        info, offset = header[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {list(info.shape)}; {CONFIG} and the model imply {list(shape)}: is the "
                "adapter for another model?"
            )
        if not DTYPES[info.dtype].is_floating_point:
            raise CheckpointError(f"{path}: {name} is of {info.dtype}; adapters are floating point")
        return file.read(offset, info.shape, DTYPES[info.dtype])

    modules = {}
    for module in targets:
        rank, scale = config.rank_and_scale(module)
        n, k = shapes[module]
        modules[module] = LowRank(tensor(module, "A", (rank, k)), tensor(module, "B", (n, rank)), scale)
    return Adapter(folder, modules)


def _hint(name: str, shapes: Mapping[str, object]) -> str:
    if "lora_embedding" in name or "lora_" not in name:
        return ". turbolm serves LoRA on the matrices of layers alone"
    return f" (such as {next(iter(shapes))})"


class _Config:
    """adapter_config.json, checked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"can't read {path} ({error.strerror}): an adapter is a folder with {CONFIG}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no JSON ({error})") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} is no JSON object")
        self._values: dict[str, Any] = values
        self._check_kind()
        self._rank = self._number("r", self._values.get("r"), whole=True)
        self._alpha = self._number("lora_alpha", self._values.get("lora_alpha"))
        self._ranks = self._pattern("rank_pattern", whole=True)
        self._alphas = self._pattern("alpha_pattern", whole=False)
        self._is_rank_stabilized = self._values.get("use_rslora") or False

    def _check_kind(self) -> None:
        values = self._values
        if values.get("peft_type") != "LORA":
            raise UnsupportedModelError(
                f"{self._path}: peft_type is {values.get('peft_type')!r:.40}; turbolm serves LORA"
            )
        if values.get("bias", "none") != "none":
            raise UnsupportedModelError(f"{self._path}: bias is {values['bias']!r:.40}; turbolm serves 'none'")
        started = values.get("init_lora_weights")
        if isinstance(started, str) and started.lower().startswith(_CHANGES_BASE):
            raise UnsupportedModelError(
                f"{self._path}: init_lora_weights is {started!r:.40}, which changes the base model, too; save the "
                "adapter converted to plain LoRA (path_initial_model_for_weight_conversion)"
            )
        for name, value in values.items():
            if name not in _SILENT and value not in (None, False, "", [], {}):
                raise UnsupportedModelError(
                    f"{self._path}: {name} is {value!r:.80}, which turbolm doesn't compute; it serves plain LoRA"
                )

    def targets(self, shapes: Mapping[str, object], others: set[str]) -> list[str]:
        """The modules that the adapter adds to. `others`: matrices of the model that it can't."""
        found = [name for name in (*shapes, *others) if self._is_target(name)]
        refused = [name for name in found if name in others]
        if refused:
            raise UnsupportedModelError(
                f"{self._path}: target_modules takes in {refused[0]}; turbolm serves LoRA on the matrices of layers"
            )
        if not found:
            raise CheckpointError(
                f"{self._path}: target_modules {self._values.get('target_modules')!r:.120} are no modules of this "
                f"model, such as {next(iter(shapes))}: is the adapter for another one?"
            )
        given = self._values.get("target_modules")
        for target in given if isinstance(given, list) else ():
            if not any(_ends_with(name, target) for name in shapes):
                raise CheckpointError(f"{self._path}: target_modules names {target!r}, which this model doesn't have")
        return found

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        rank = int(_lookup(self._ranks, module, self._rank))
        alpha = _lookup(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._is_rank_stabilized else rank)

    def _is_target(self, module: str) -> bool:
        excluded = self._values.get("exclude_modules")
        if excluded and self._matcher("exclude_modules", excluded)(module):
            return False
        given = self._values.get("target_modules")
        if given == "all-linear":
            return ".layers." in module  # all but the head
        return self._matcher("target_modules", given)(module) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        layers = self._values.get("layers_to_transform")
        if layers is None or layers == [] or isinstance(self._values.get("target_modules"), str):
            return True
        match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])

    def _matcher(self, name: str, given: object) -> Callable[[str], bool]:
        """A list holds names, or ends of names; a text is a regular expression of whole names."""
        if isinstance(given, list) and all(isinstance(item, str) for item in given):
            return lambda module: any(_ends_with(module, item) for item in given)
        if not isinstance(given, str):
            raise CheckpointError(f"{self._path}: {name} is {given!r:.80}; expected names or a regular expression")
        return lambda module: self._compiled(name, given).fullmatch(module) is not None

    def _compiled(self, name: str, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{self._path}: {name} holds {pattern!r:.80}, no regular expression ({error})"
            ) from None

    def _pattern(self, name: str, whole: bool) -> list[tuple[re.Pattern[str], float]]:
        given = self._values.get(name) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{self._path}: {name} is {given!r:.80}; expected an object")
        return [
            (self._compiled(name, rf"(.*\.)?({key})"), self._number(f"{name} of {key}", value, whole))
            for key, value in given.items()
        ]

    def _number(self, name: str, value: object, whole: bool = False) -> float:
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not value > 0 or (whole and value > MAX_RANK):  # type: ignore[arg-type, operator]
            allowed = f"a whole number from 1 to {MAX_RANK}" if whole else "a number above 0"
            raise CheckpointError(f"{self._path}: {name} is {value!r:.40}; expected {allowed}")
        return value  # type: ignore[return-value]


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _lookup(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    """As PEFT: the first pattern that the name, or its end after a dot, matches."""
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
