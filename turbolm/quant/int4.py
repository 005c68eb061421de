"""Integers of 4 bits with a scale and a zero point for each group of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.quant.grouped import GroupedFormat
from turbolm.quant.nibbles import unpack_nibbles
from turbolm.weights import Weight

MIDDLE = 8  # the zero point of symmetric matrices


class GroupedInt4(GroupedFormat):
    """weight = (code - zero) * scale; codes uint8 [n, k/2], low nibble = even column; zeros 0..16."""

    name = "int4"
    codes_per_entry = 2

    def _values(self, codes: Tensor) -> Tensor:
        return unpack_nibbles(codes).float()


INT4 = GroupedInt4()


def int4(codes: Tensor, scales: Tensor, zeros: Tensor, columns: Tensor | None = None) -> Weight:
    """A Weight of codes uint8 [n, k/2], scales float16|bfloat16|float32 [n, k/g], zeros uint8 [n, k/g] and, where
    columns are stored in another order than the input's, columns int32 [k]. Raises ValueError where they don't fit."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    fits = scales.shape == zeros.shape and scales.shape[0] == n and k and k % max(1, scales.shape[1]) == 0
    if not fits or (columns is not None and columns.shape != (k,)):
        shapes = [list(tensor.shape) for tensor in (codes, scales, zeros, columns) if tensor is not None]
        raise ValueError(f"codes, scales, zeros, columns of shapes {shapes} make no int4 matrix")
    if codes.dtype != torch.uint8 or zeros.dtype != torch.uint8 or not scales.is_floating_point():
        raise ValueError(f"int4 is uint8, floating point, uint8; got {codes.dtype}, {scales.dtype}, {zeros.dtype}")
    tensors = {"codes": codes, "scales": scales, "zeros": zeros}
    if columns is not None:
        tensors["columns"] = columns.to(torch.int32)
    return Weight(INT4, (n, k), tensors)


def is_symmetric(weight: Weight) -> bool:
    """Whether all zero points of an int4 matrix are in the middle."""
    return bool((weight.tensors["zeros"] == MIDDLE).all())


def symmetric_zeros(n: int, num_groups: int, device: torch.device | None = None) -> Tensor:
    """uint8 [n, k/g]: the zero points of a symmetric matrix."""
    return torch.full((n, num_groups), MIDDLE, dtype=torch.uint8, device=device)
