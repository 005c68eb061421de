"""4-bit integers in groups: choosing scales and zero points, and rounding to them.

n  rows      k  columns      g  columns of a group      G = k / g      weight = (code - zero) * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.quant.int4 import int4
from turbolm.quant.nibbles import pack_nibbles
from turbolm.quant.rounding import int4_codes, int4_range
from turbolm.weights import Weight

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)  # parts of a group's range that clipping may leave
_CHUNK = 1 << 24  # numbers of a temporary


@dataclass(frozen=True, slots=True)
class Grid:
    """Kinds of groups."""

    group_size: int  # -1: a whole row
    symmetric: bool
    scale_dtype: torch.dtype  # in which scales are stored

    def width(self, num_columns: int) -> int:
        """g for rows of so many columns."""
        return num_columns if self.group_size < 0 else self.group_size


@dataclass(frozen=True, slots=True)
class Rounded:
    """Matrices on the grid, stacked by rows."""

    codes: Tensor  # uint8 [n, k], 0..15; column j holds the input feature columns[j]
    scales: Tensor  # float32 [n, G], numbers of the grid's scale_dtype
    zeros: Tensor  # uint8 [n, G]
    columns: Tensor | None = None  # int64 [k]; None: in order

    def weights(self, sizes: list[int], scale_dtype: torch.dtype) -> list[Weight]:
        """The matrices, of `sizes` rows."""
        packed, scales = pack_nibbles(self.codes), self.scales.to(scale_dtype)
        parts = zip(*(torch.split(tensor, sizes) for tensor in (packed, scales, self.zeros)), strict=True)
        return [int4(codes, scales, zeros, self.columns) for codes, scales, zeros in parts]


def full_range(groups: Tensor, grid: Grid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scales and zero points [...] of groups [..., g] that cover `shrink` of each group's range. Zero points are
    1..15: GPTQ's first version has no 0, and a group that needs one has no negative weight to lose."""
    scales, zeros = int4_range(groups, grid.symmetric, grid.scale_dtype, shrink=shrink, lowest_zero=1)
    return scales.clamp(max=torch.finfo(grid.scale_dtype).max), zeros


def nearest_values(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (int4_codes(values, scales, zeros) - zeros) * scales


def round_matrix(matrix_nk: Tensor, scales: Tensor, zeros: Tensor) -> Rounded:
    """Every weight to the nearest code."""
    groups = matrix_nk.view(*scales.shape, -1)
    codes = int4_codes(groups, scales.unsqueeze(2), zeros.unsqueeze(2)).to(torch.uint8)
    return Rounded(codes.view(matrix_nk.shape), scales, zeros.to(torch.uint8))


def search_grid(matrix_nk: Tensor, gram_kk: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points [n, G] that, of several clipped ranges, change each group's part of the output
    least (weights alone, where there is no gram)."""
    k = matrix_nk.shape[1]
    g = grid.width(k)
    grams = None if gram_kk is None else _diagonal_blocks(gram_kk, g)
    parts = [_search(rows.view(-1, k // g, g), grams, grid) for rows in torch.split(matrix_nk, max(1, _CHUNK // k))]
    return torch.cat([scales for scales, _ in parts]), torch.cat([zeros for _, zeros in parts])


def _diagonal_blocks(gram_kk: Tensor, g: int) -> Tensor:
    """[G, g, g]"""
    num_groups = gram_kk.shape[0] // g
    index = torch.arange(num_groups, device=gram_kk.device)
    return gram_kk.view(num_groups, g, num_groups, g)[index, :, index]


def _search(groups: Tensor, grams: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """groups [n, G, g], grams [G, g, g] → scales and zeros [n, G]."""
    scales, zeros = full_range(groups, grid)
    best = _group_errors(groups, scales, zeros, grams)
    for shrink in _SHRINK[1:]:
        candidate = full_range(groups, grid, shrink)
        errors = _group_errors(groups, *candidate, grams)
        better = errors < best
        best = torch.where(better, errors, best)
        scales, zeros = torch.where(better, candidate[0], scales), torch.where(better, candidate[1], zeros)
    return scales, zeros


def _group_errors(groups: Tensor, scales: Tensor, zeros: Tensor, grams: Tensor | None) -> Tensor:
    """[n, G]: the mean of (Δ x)² over tokens, of each group alone."""
    delta = nearest_values(groups, scales.unsqueeze(2), zeros.unsqueeze(2)) - groups
    if grams is None:
        return delta.square().sum(2)
    return ((delta.transpose(0, 1) @ grams).transpose(0, 1) * delta).sum(2)
