"""Weights of 8 bits with a scale per output row, as rows: for the kernel for few rows, and for PyTorch's products
with activations of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turbolm.ops.cuda.plan import FP8, INT8, Unit

if TYPE_CHECKING:
    from turbolm.weights import Weight


@dataclass(frozen=True, slots=True)
class EightBitMatrix:
    """weight = code * scale."""

    codes: Tensor  # int8 or float8_e4m3fn [n, k]
    scales: Tensor  # float32 [n]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def unit(self) -> Unit:
        return INT8 if self.codes.dtype == torch.int8 else FP8


def supports(n: int, k: int) -> bool:
    """Whether products take such a matrix."""
    return n > 0 and k > 0 and n % 16 == 0 and k % 128 == 0


def row_scales(weight: Weight) -> Tensor | None:
    """float32 [n] of an int8 or fp8 matrix; None where a row has several."""
    scales = weight.tensors["scales"].float()
    n = weight.shape[0]
    if scales.shape[1] != 1 or scales.shape[0] not in (1, n):
        return None
    return scales[:, 0].expand(n)
