"""Plain floating-point matrices: one element per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.quant.rows import RowFormat
from turbolm.weights import Weight


class DenseFormat(RowFormat):
    """`tensors["data"]`: [n, k] in `storage_dtype`."""

    is_dense = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.storage_dtype = dtype
        self.block_size = self.block_width = 1

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The matrix itself where it is in `dtype` already, else a rounded copy."""
        return weight.tensors["data"].to(dtype)


def dense(matrix_nk: Tensor) -> Weight:
    """A float32, float16 or bfloat16 matrix [n, k] as a Weight."""
    for weight_format in (F32, F16, BF16):
        if matrix_nk.dtype == weight_format.storage_dtype:
            return weight_format.pack(matrix_nk, (matrix_nk.shape[0], matrix_nk.shape[1]))
    raise TypeError(f"no dense format holds {matrix_nk.dtype}")


F32 = DenseFormat("f32", torch.float32)
F16 = DenseFormat("f16", torch.float16)
BF16 = DenseFormat("bf16", torch.bfloat16)
