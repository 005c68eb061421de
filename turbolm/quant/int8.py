"""Signed integers of 8 bits with a scale for each row, or for each group of its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.quant.grouped import GroupedFormat
from turbolm.weights import Weight


class GroupedInt8(GroupedFormat):
    """weight = code * scale; codes int8 [n, k], scales float32 [n, 1] or [n, k/g]."""

    name = "int8"
    codes_per_entry = 1

    def _values(self, codes: Tensor) -> Tensor:
        return codes.float()


INT8 = GroupedInt8()


def int8(codes: Tensor, scales: Tensor) -> Weight:
    """A Weight of codes int8 [n, k] and scales [n, 1] or [n, k/g]. Raises ValueError where they don't fit."""
    n, k = codes.shape
    if codes.dtype != torch.int8 or scales.dim() != 2 or scales.shape[0] != n or k % max(1, scales.shape[1]):
        raise ValueError(
            f"int8 is int8 [n, k] and scales [n, k/g]; got {codes.dtype} {list(codes.shape)}, {list(scales.shape)}"
        )
    return Weight(INT8, (n, k), {"codes": codes, "scales": scales.float()})
