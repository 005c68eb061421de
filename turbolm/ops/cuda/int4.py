"""Weights of 4 bits in the layout of the kernels (`kernels/int4.cuh` describes it).

n, k  rows and columns of a matrix    g  columns that share a scale    b  bytes of a unit: 16 rows by 128 columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.ops.cuda.plan import INT4, Unit

_UNIT_K = 128
_TILE_ROWS = 16
_CHUNK_ELEMENTS = 1 << 26  # laid out at a time


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """A matrix [n, k] of 4 bits."""

    units: Tensor  # uint8 [n/16, k/128, b]
    group_size: int  # 32, 64 or 128

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.units.shape[0]) * _TILE_ROWS, int(self.units.shape[1]) * _UNIT_K

    @property
    def unit(self) -> Unit:
        return INT4[self.group_size]


def supports(n: int, k: int, group_size: int) -> bool:
    """Whether `pack` takes such a matrix."""
    fits = group_size in INT4 or (group_size > 0 and group_size % _UNIT_K == 0)
    return fits and n > 0 and k > 0 and n % _TILE_ROWS == 0 and k % _UNIT_K == 0 and k % group_size == 0


def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> Int4Matrix:
    """codes uint8 [n, k/2], low nibble = even column; scales floating point [n, k/g], of which 18 bits of the
    mantissa are kept; zeros uint8 [n, k/g], 0 to 16. Shapes as `supports` says."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    group_size = k // scales.shape[1]
    assert supports(n, k, group_size)
    unit = INT4[min(group_size, _UNIT_K)]
    num_tiles, num_units = n // _TILE_ROWS, k // _UNIT_K
    units = torch.empty((num_tiles, num_units, unit.num_bytes), dtype=torch.uint8, device=codes.device)
    by_half = codes.view(2, num_tiles, 8, k // 2)
    step = max(1, _CHUNK_ELEMENTS // (_TILE_ROWS * k))
    for first in range(0, num_tiles, step):
        tiles = slice(first, first + step)
        units[tiles, :, :1024] = _code_bytes(by_half[:, tiles])
    words = _scale_words(scales, zeros).view(2, num_tiles, 8, -1)
    words = words.repeat_interleave(num_units * unit.groups // words.shape[3], 3)
    words = words.view(2, num_tiles, 8, num_units, unit.groups).permute(1, 3, 4, 2, 0).contiguous()
    units[:, :, 1024:] = words.view(torch.uint8).view(num_tiles, num_units, -1)
    return Int4Matrix(units, 128 // unit.groups)


def _code_bytes(codes: Tensor) -> Tensor:
    """[2 halves of n, tiles, 8 rows, k/2] → [tiles, units, 1024]."""
    _, num_tiles, _, num_bytes = codes.shape
    num_units = 2 * num_bytes // _UNIT_K
    # 128 columns: 2 halves, 4 words, 2 registers, 4 lanes, 2 of a pair (the nibbles of one byte)
    codes = codes.reshape(2, num_tiles, 8, num_units, 2, 4, 2, 4)
    low, high = codes & 15, codes >> 4
    # byte `2 * pair + register` of a word: row g in its low nibble, row g + 8 in its high one
    pairs = torch.stack([low[0] | low[1] << 4, high[0] | high[1] << 4], -1)
    # tiles, g, units, halves, words, registers, lanes, pair → tiles, units, halves, g, lanes, words, pair, registers
    return pairs.permute(0, 2, 3, 1, 6, 4, 7, 5).reshape(num_tiles, num_units, 1024)


def _scale_words(scales: Tensor, zeros: Tensor) -> Tensor:
    """int32: a float32 scale rounded to leave its lowest 5 bits to the zero point."""
    bits = scales.float().contiguous().view(torch.int32)
    return ((bits + 16) & ~31) | zeros.to(torch.int32)
