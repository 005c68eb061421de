"""Floating point of 8 bits (e4m3) with a scale for the matrix, for each row, or for each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbolm.errors import ConfigError
from turbolm.quant.rows import check_split
from turbolm.weights import Weight

LARGEST = 448.0  # of e4m3
BLOCK = 128  # rows and columns of a block, in matrices that have blocks
_CHUNK_ELEMENTS = 1 << 20  # unpacked at a time


class Fp8:
    """weight = code * scale; codes float8_e4m3fn [n, k], scales float32 [ceil(n/bn), ceil(k/bk)], where bn is
    1, n or 128, and bk is k or 128. Optional: input_scale float32 [], the calibrated scale of activations."""

    name = "fp8"
    is_dense = False

    def select_rows(self, weight: Weight, rows: Tensor) -> Weight:
        """A copy of these rows (int64 indices), in this order; then every row has its own scales."""
        codes = weight.tensors["codes"]
        rows = rows.to(codes.device)
        codes = codes.view(torch.uint8).index_select(0, rows).view(torch.float8_e4m3fn)
        scales = _row_scales(weight).index_select(0, rows)
        return self._like(weight, codes, scales)

    def shard(self, weight: Weight, dim: int, rank: int, size: int) -> Weight:
        """The rank-th of `size` equal parts along rows (0) or columns (1). Raises ConfigError where these, or
        blocks of columns, don't divide by `size`."""
        n, k = weight.shape
        codes, scales = weight.tensors["codes"], weight.tensors["scales"]
        block_rows, block_columns = block_shape(weight)
        part = check_split(weight.shape, dim, size, weight.shape[dim], ("rows", "columns")[dim])
        codes = codes.narrow(dim, rank * part, part).contiguous()
        if dim == 0:
            if block_rows == n:
                return self._like(weight, codes, scales)
            if part % block_rows == 0:
                units = part // block_rows
                return self._like(weight, codes, scales.narrow(0, rank * units, units))
            return self._like(weight, codes, _row_scales(weight).narrow(0, rank * part, part))
        if block_columns == k:
            return self._like(weight, codes, scales)
        if part % block_columns:
            raise ConfigError(
                f"a {n} x {k} matrix can't be split over {size} devices along its columns: {part} of them are not "
                f"whole fp8 blocks of {block_columns}; choose another number of devices"
            )
        units = part // block_columns
        return self._like(weight, codes, scales.narrow(1, rank * units, units).contiguous())

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """Matrices with the same k and blocks of columns, stacked by output rows."""
        assert len({(w.shape[1], w.tensors["scales"].shape[1]) for w in weights}) == 1
        codes = torch.cat([w.tensors["codes"].view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn)
        by_block = all(block_shape(w)[0] == BLOCK and w.shape[0] % BLOCK == 0 for w in weights)
        scales = torch.cat([w.tensors["scales"] if by_block else _row_scales(w) for w in weights])
        inputs = [w.tensors["input_scale"] for w in weights if "input_scale" in w.tensors]
        assert len(inputs) in (0, len(weights)), "stacked matrices have the same kind of activations"
        return fp8(codes, scales, torch.stack(inputs).amax() if inputs else None)

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """[n, k]: computed in float32, rounded to `dtype`."""
        n, k = weight.shape
        codes, block_columns = weight.tensors["codes"], block_shape(weight)[1]
        scales = _row_scales(weight)
        result_nk = torch.empty((n, k), dtype=dtype, device=codes.device)
        step = max(1, _CHUNK_ELEMENTS // max(k, 1))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            factors = scales[rows]
            if block_columns < k:
                factors = factors.repeat_interleave(block_columns, 1)[:, :k]
            result_nk[rows] = codes[rows].float() * factors
        return result_nk

    def _like(self, weight: Weight, codes: Tensor, scales: Tensor) -> Weight:
        return fp8(codes, scales, weight.tensors.get("input_scale"))


FP8 = Fp8()


def fp8(codes: Tensor, scales: Tensor, input_scale: Tensor | None = None) -> Weight:
    """A Weight of codes float8_e4m3fn [n, k] and scales as `Fp8` says. Raises ValueError where they don't fit."""
    tensors = {"codes": codes, "scales": scales.float()}
    if input_scale is not None:
        tensors["input_scale"] = input_scale.float().reshape(())
    weight = Weight(FP8, (codes.shape[0], codes.shape[1]), tensors)
    if codes.dtype != torch.float8_e4m3fn or scales.dim() != 2:
        raise ValueError(f"fp8 is float8_e4m3fn [n, k] and scales [a, b]; got {codes.dtype}, {list(scales.shape)}")
    block_shape(weight)
    return weight


def block_shape(weight: Weight) -> tuple[int, int]:
    """(bn, bk): rows and columns that share a scale; bk is k or 128."""
    (n, k), (a, b) = weight.shape, weight.tensors["scales"].shape
    rows = n if a == 1 else 1 if a == n else BLOCK
    columns = k if b == 1 else BLOCK
    if (a, b) != (-(-n // rows), -(-k // columns)):
        raise ValueError(f"scales of shape [{a}, {b}] fit no fp8 matrix of shape [{n}, {k}]")
    return rows, columns


def _row_scales(weight: Weight) -> Tensor:
    """[n, ceil(k/bk)]: each row's own."""
    n, rows = weight.shape[0], block_shape(weight)[0]
    scales = weight.tensors["scales"]
    if rows == n:
        return scales.expand(n, -1)
    return scales if rows == 1 else scales.repeat_interleave(rows, 0)[:n]
