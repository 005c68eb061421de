"""The rows of a matrix as the bytes that csrc/pack.h packs.

Dense formats and GGUF's blocks are packed as they are. int4, int8 and fp8 become blocks of 32 columns:

    int4    q4_1 (scale, minimum, 32 codes), or q4_0 where all zero points are 8; a group's scale and minimum are
            repeated in its blocks, in float16
    int8    q8_0 (scale, 32 codes)
    fp8     q8_0, rounded once more: little beside the error of e4m3 itself, and half of float16's bytes

Where groups end inside a block, or columns are stored in another order than the input's, they are unpacked to float16.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.fallbacks import note_fallback
from turbolm.weights import Weight

log = logging.getLogger(__name__)

_BLOCK = 32  # columns
_LARGEST_SCALE = 2.0**11  # times 16, the largest zero point, it is a float16 still
_QUANTIZED = {"int4", "int8", "fp8"}


@dataclass(frozen=True, slots=True)
class RowSource:
    """A matrix [n, k], to be read row by row."""

    format: str  # of the rows, as csrc/pack.h calls it
    shape: tuple[int, int]
    read: Callable[[slice], Tensor]  # rows → contiguous bytes or floats


def row_source(weight: Weight, known: frozenset[str]) -> RowSource | None:
    """The rows of `weight` in one of the formats `known`; None where there is no such form."""
    name = weight.format.name
    if name in known:
        return RowSource(name, weight.shape, lambda rows: weight.tensors["data"][rows].contiguous())
    if name not in _QUANTIZED:
        return None
    if not _fits_blocks(weight):
        return unpacked_rows(weight, "f16")
    if name == "int4":
        is_symmetric = bool((weight.tensors["zeros"] == 8).all())
        return RowSource(
            "q4_0" if is_symmetric else "q4_1", weight.shape, functools.partial(_int4_rows, weight, is_symmetric)
        )
    return RowSource("q8_0", weight.shape, functools.partial(_int8_rows if name == "int8" else _fp8_rows, weight))


def unpacked_rows(weight: Weight, name: str) -> RowSource:
    """The rows as numbers of the dense format `name`: "f32" or "f16"."""
    dtype = {"f32": torch.float32, "f16": torch.float16}[name]

    def read(rows: slice) -> Tensor:
        index = torch.arange(rows.start, rows.stop)
        return weight.format.select_rows(weight, index).dequantize(dtype).contiguous()

    return RowSource(name, weight.shape, read)


def _fits_blocks(weight: Weight) -> bool:
    k, tensors = weight.shape[1], weight.tensors
    if "columns" in tensors:
        _tell("columns in activation order have no native kernels: such weights are unpacked to 16 bits")
        return False
    if weight.format.name == "fp8":
        return k % _BLOCK == 0
    group = k // tensors["scales"].shape[1]
    if k % _BLOCK or group % _BLOCK or float(tensors["scales"].abs().amax()) > _LARGEST_SCALE:
        _tell(f"groups of {group} columns have no native kernels: such weights are unpacked to 16 bits")
        return False
    return True


def _int4_rows(weight: Weight, is_symmetric: bool, rows: slice) -> Tensor:
    """uint8 [r, k/32 * 18 or 20]"""
    tensors = weight.tensors
    packed = tensors["codes"][rows].view(rows.stop - rows.start, -1, _BLOCK // 2)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2)
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    scales = tensors["scales"][rows].float()
    headers = [scales] if is_symmetric else [scales, -tensors["zeros"][rows].float() * scales]
    return torch.cat([*(_per_block(header, packed.shape[1]) for header in headers), nibbles], dim=2).flatten(1)


def _int8_rows(weight: Weight, rows: slice) -> Tensor:
    """uint8 [r, k/32 * 34]"""
    codes = weight.tensors["codes"][rows].view(torch.uint8).view(rows.stop - rows.start, -1, _BLOCK)
    return torch.cat([_per_block(weight.tensors["scales"][rows], codes.shape[1]), codes], dim=2).flatten(1)


def _fp8_rows(weight: Weight, rows: slice) -> Tensor:
    """uint8 [r, k/32 * 34]"""
    index = torch.arange(rows.start, rows.stop)
    values = weight.format.select_rows(weight, index).dequantize(torch.float32).view(index.numel(), -1, _BLOCK)
    scales = (values.abs().amax(2) / 127).to(torch.float16)
    divisors = torch.where(scales == 0, 1.0, scales.float()).unsqueeze(2)
    codes = (values / divisors).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    return torch.cat([_per_block(scales, codes.shape[1]), codes], dim=2).flatten(1)


def _per_block(values: Tensor, num_blocks: int) -> Tensor:
    """[r, k/g] → float16, repeated in the blocks of each group, as uint8 [r, k/32, 2]."""
    repeated = values.to(torch.float16).repeat_interleave(num_blocks // values.shape[1], 1)
    return repeated.unsqueeze(2).view(torch.uint8)


def _tell(message: str) -> None:
    note_fallback(log, message)
