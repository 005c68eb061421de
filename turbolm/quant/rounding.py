"""Rounding to the nearest: dense weights to int4, int8 or fp8 without any data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from turbolm.errors import CheckpointError, ConfigError
from turbolm.quant.fp8 import LARGEST, fp8
from turbolm.quant.int4 import MIDDLE, int4
from turbolm.quant.int8 import int8
from turbolm.quant.nibbles import pack_nibbles
from turbolm.weights import Weight

RoundedFormat = Literal["int4", "int8", "fp8"]

_CHUNK_ELEMENTS = 1 << 22  # rounded at a time
LEVELS = 15  # the largest code of int4
_SMALLEST = 2.0**-24  # scale: the smallest number of float16


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the matrices of an unquantized checkpoint are rounded to while they are loaded."""

    layers: RoundedFormat
    vocabulary: RoundedFormat | None  # of embedding and head; None: these stay as they are
    vocabulary_names: frozenset[str]  # their modules
    group_size: int | None = None  # as `round_weight` says; rows that it doesn't divide have the default's

    @classmethod
    def at_load(cls, layers: RoundedFormat, device: str, vocabulary_names: frozenset[str]) -> Rounding:
        """As the engine rounds for `device`. On the CPU, whose kernels have a scale for 32 columns at any rate, groups
        are of this size, and the vocabulary's matrices, a large part of small models, are rounded too."""
        if device == "cpu":
            return cls(layers, "int8", vocabulary_names, group_size=32)
        return cls(layers, None, vocabulary_names)

    def round(self, weight: Weight, prefix: str) -> Weight:
        """`weight`, the module `prefix`'s. Raises ConfigError where it is quantized already, CheckpointError where it
        holds NaN or infinity."""
        target = self.vocabulary if prefix in self.vocabulary_names else self.layers
        if target is None:
            return weight
        if not weight.format.is_dense:
            raise ConfigError(
                f"{prefix}.weight is stored as {weight.format.name}, and weights is '{self.layers}': only unquantized "
                "checkpoints are rounded; use weights 'auto', or get the unquantized model"
            )
        size = self.group_size
        fits = target != "fp8" and size is not None and weight.shape[1] % size == 0
        rounded = round_weight(weight.tensors["data"], target, group_size=size if fits else None)
        if not torch.isfinite(rounded.tensors["scales"]).all():
            raise CheckpointError(f"{prefix}.weight holds numbers that are not finite, or too large for {target}")
        return rounded


def round_weight(
    weight_nk: Tensor,
    target: RoundedFormat,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
) -> Weight:
    """A dense matrix rounded to the nearest codes, on its device.

    group_size: columns that share a scale; -1: all of a row. None: int4 takes the largest of 128, 64 and 32 that
    divides k, or else the row; int8 and fp8 (which allows nothing else) the row. symmetric: int4 with zero points
    in the middle (int8 and fp8 always are). Scales of int4 are float16.
    Raises ConfigError where the group size doesn't fit.
    """
    k = weight_nk.shape[1]
    group = _group(k, target, group_size)
    if target == "fp8":
        if group != k:
            raise ConfigError(f"fp8 weights are rounded by rows; group_size is {group_size}, allowed: -1")
        step: Callable[[Tensor], tuple[Tensor, ...]] = _round_fp8
    elif target == "int8":
        step = partial(_round_int8, group=group)
    else:
        step = partial(_round_int4, group=group, symmetric=symmetric)
    parts = [step(rows) for rows in torch.split(weight_nk, max(1, _CHUNK_ELEMENTS // max(k, 1)))]
    tensors = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    if target == "fp8":
        return fp8(tensors[0].view(torch.float8_e4m3fn), tensors[1])
    return int8(tensors[0], tensors[1]) if target == "int8" else int4(tensors[0], tensors[1], tensors[2])


def _group(k: int, target: str, group_size: int | None) -> int:
    if group_size is None:
        sizes = (128, 64, 32) if target == "int4" else ()
        group_size = next((size for size in sizes if k % size == 0), -1)
    group = k if group_size == -1 else group_size
    if group < 1 or k % group or (target == "int4" and (k % 2 or group % 2)):
        raise ConfigError(f"{k} columns can't be rounded to {target} in groups of {group}; choose one that divides {k}")
    return group


def int4_range(
    groups: Tensor, symmetric: bool, dtype: torch.dtype, *, shrink: float = 1.0, lowest_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 [...], with which codes cover `shrink` of the range of groups [..., g], 0 among
    it. Scales are as `dtype` holds them: never 0, and infinite where a range is too large for it."""
    high, low = groups.amax(-1).clamp(min=0) * shrink, groups.amin(-1).clamp(max=0) * shrink
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / LEVELS).clamp(min=_SMALLEST).to(dtype).float()
    if symmetric:
        return scales, torch.full_like(scales, MIDDLE)
    return scales, (-low / scales).round_().clamp_(lowest_zero, LEVELS)


def int4_codes(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest codes, as floats, of the same shape as `values`; scales and zeros broadcast."""
    return (values / scales).add_(zeros).round_().clamp_(0, LEVELS)


def _round_int4(rows: Tensor, group: int, symmetric: bool) -> tuple[Tensor, ...]:
    """float [r, k] → codes, scales, zeros."""
    groups = rows.float().reshape(rows.shape[0], -1, group)
    scales, zeros = int4_range(groups, symmetric, torch.float16)
    codes = int4_codes(groups, scales.unsqueeze(2), zeros.unsqueeze(2)).to(torch.uint8)
    return pack_nibbles(codes.view(rows.shape)), scales.half(), zeros.to(torch.uint8)


def _round_int8(rows: Tensor, group: int) -> tuple[Tensor, ...]:
    """float [r, k] → codes, scales."""
    groups = rows.float().reshape(rows.shape[0], -1, group)
    scales = (groups.abs().amax(2, keepdim=True) / 127).clamp_(min=_SMALLEST)
    return (groups / scales).round_().to(torch.int8).view(rows.shape), scales[..., 0]


def _round_fp8(rows: Tensor) -> tuple[Tensor, ...]:
    """float [r, k] → codes as bytes, scales."""
    values = rows.float()
    scales = (values.abs().amax(1, keepdim=True) / LARGEST).clamp_(min=_SMALLEST)
    return (values / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales
