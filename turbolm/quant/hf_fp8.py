"""fp8 checkpoints with quant_method "fp8": blocks of 128 x 128, as DeepSeek and transformers write them, or one
scale per matrix or row.

    weight  float8_e4m3fn [n, k]    weight_scale_inv  [ceil(n/128), ceil(k/128)], or weight_scale  [] | [1] | [n, 1]

Both kinds of scales multiply the weight. input_scale [] | [1] where activations were calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from turbolm.errors import CheckpointError
from turbolm.quant.fp8 import BLOCK, fp8
from turbolm.quant.method import SCALES, Fields, read_part, read_scales
from turbolm.weights import Weight, WeightSource

_SILENT = frozenset(["quant_method", "modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize"])


@dataclass(frozen=True, slots=True)
class HfFp8:
    """`has_blocks`: scales are for blocks of 128 x 128."""

    has_blocks: bool
    method = "fp8"
    formats = ("fp8",)
    has_order = False

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> HfFp8:
        """From a quantization_config. Raises UnsupportedModelError naming a field that turbolm can't follow."""
        fields = Fields(config, "quantization_config (fp8)")
        fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
        block = fields.get("weight_block_size")
        if block not in (None, [BLOCK, BLOCK]):
            raise fields.refusal("weight_block_size", block, ([BLOCK, BLOCK], None))
        fields.finish(_SILENT)
        return cls(block is not None)

    def detect(self, source: WeightSource, prefix: str) -> bool:
        return detect_fp8(source, prefix)

    def load(self, source: WeightSource, prefix: str) -> Weight:
        scale = "weight_scale_inv" if f"{prefix}.weight_scale_inv" in source.tensors else "weight_scale"
        return load_fp8(source, prefix, scale, self.has_blocks)


def detect_fp8(source: WeightSource, prefix: str) -> bool:
    info = source.tensors.get(f"{prefix}.weight")
    return info is not None and info.dtype == "F8_E4M3"


def load_fp8(source: WeightSource, prefix: str, scale: str, has_blocks: bool) -> Weight:
    """The matrix `prefix`.weight with the scales `prefix`.`scale`."""
    name, shape = f"{prefix}.weight", source.tensors[f"{prefix}.weight"].shape
    if len(shape) != 2:
        raise CheckpointError(f"{name} has shape {list(shape)}; a matrix [n, k] is needed")
    n, k = shape
    reason = f"holds the scales of {name} {list(shape)}"
    info = source.tensors.get(f"{prefix}.{scale}")
    if has_blocks:
        expected: tuple[int, ...] = (-(-n // BLOCK), -(-k // BLOCK))
    elif info is not None and info.shape in ((), (1,), (n,), (n, 1)):
        expected = info.shape
    else:
        expected = (n, 1)
    scales = read_scales(source, f"{prefix}.{scale}", expected, reason)
    return fp8(source.read(name), scales if has_blocks else scales.reshape(-1, 1), _input_scale(source, prefix))


def _input_scale(source: WeightSource, prefix: str) -> Tensor | None:
    name = f"{prefix}.input_scale"
    info = source.tensors.get(name)
    if info is None:
        return None
    return read_part(source, name, SCALES, info.shape if info.shape in ((), (1,)) else (1,), "is one number")
