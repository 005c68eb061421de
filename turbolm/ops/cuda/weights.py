"""Matrices as the GPU's products want them: what `prepare_linear` makes, and which kernel multiplies by it.

t  rows of x    n, k  out and in features    p  parts that k was split into    f = n / 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from turbolm.ops.cuda import linear as few
from turbolm.ops.cuda import single, wide
from turbolm.ops.cuda.eight_bit import EightBitMatrix
from turbolm.ops.cuda.int4 import Int4Matrix
from turbolm.ops.cuda.plan import MAX_TOKENS
from turbolm.ops.triton.rounding import round_rows, scale_sums
from turbolm.ops.triton.unpack import unpack_int4

if TYPE_CHECKING:
    from turbolm.ops import Activation

# Rows of x up to which the kernel for few rows is the fastest (docs/log.md): …
_FEW_ROWS = 16
_FEW_ROWS_OF_SMALL = 32  # … with 16-bit weights of at most
_LARGE = 16 << 20  # bytes
_FEW_ROWS_OF_INT4 = 8
_WIDE_ROWS_OF_DENSE = 64  # up to which large 16-bit weights are not cuBLAS's
_INT8_ROWS = 32  # torch._int_mm takes more than 16
_INT8_SLICE = 2048  # rows whose sums are there at once
_WIDE_ROWS = 768  # up to which weights of 4 bits are unpacked in the product
_UNPACKED_BYTES = 256 << 20  # of weights at a time, beyond that: most matrices whole


class RowLinear:
    """Matrices stacked by output rows that lie as rows: the kernel for few rows, and for more what subclasses have."""

    __slots__ = ()
    matrix: few.Matrix
    bias: Tensor | None  # [n]

    @property
    def out_features(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.matrix.shape[1])

    @property
    def num_bytes(self) -> int:
        stored = few.stored(self.matrix)
        return stored.numel() * stored.element_size()

    def is_deferred(self, num_rows: int) -> bool:
        """Whether `parts` and `gated` are the fastest, and allowed."""
        return num_rows <= self._few_rows() and few.takes(num_rows, self.matrix)

    def _few_rows(self) -> int:
        return _FEW_ROWS

    def multiply(self, x_tk: Tensor) -> Tensor:
        """[t, n]"""
        raise NotImplementedError

    def parts(self, x_tk: Tensor) -> Tensor:
        """[p, t, n] float32, to be summed over p; or finished [t, n]."""
        return few.linear_parts(x_tk, self.matrix, self.bias)

    def gated(self, x_tk: Tensor, activation: Activation) -> Tensor:
        """activation(first half of n) * second half → [t, f]; without a bias."""
        return few.linear_gated(x_tk, self.matrix, activation)

    def logits(self, x_tk: Tensor, out_tn: Tensor) -> None:
        """Into float32 [t, n]."""
        if self.is_deferred(x_tk.shape[0]):
            few.linear_logits(x_tk, self.matrix, out_tn)
        else:
            self._multiply_into(x_tk, out_tn)

    def _multiply_into(self, x_tk: Tensor, out_tn: Tensor) -> None:
        """Without a bias, into float32."""
        raise NotImplementedError


@dataclass(slots=True)
class DenseLinear(RowLinear):
    """In the dtype of the activations."""

    weight: Tensor  # [n, k]
    bias: Tensor | None

    @property
    def matrix(self) -> Tensor:  # type: ignore[override]
        return self.weight

    def is_deferred(self, num_rows: int) -> bool:
        return RowLinear.is_deferred(self, num_rows) or self._is_wide(num_rows)

    def multiply(self, x_tk: Tensor) -> Tensor:
        return F.linear(x_tk, self.weight, self.bias)

    def parts(self, x_tk: Tensor) -> Tensor:
        if not self._is_wide(x_tk.shape[0]):
            return RowLinear.parts(self, x_tk)
        out = x_tk.new_empty((x_tk.shape[0], self.out_features))
        wide.wide_linear(x_tk, self.weight, self.bias, out)
        return out

    def gated(self, x_tk: Tensor, activation: Activation) -> Tensor:
        if not self._is_wide(x_tk.shape[0]):
            return RowLinear.gated(self, x_tk, activation)
        out = x_tk.new_empty((x_tk.shape[0], self.out_features // 2))
        wide.wide_gated(x_tk, self.weight, activation, out)
        return out

    def logits(self, x_tk: Tensor, out_tn: Tensor) -> None:
        if self._is_wide(x_tk.shape[0]):
            wide.wide_linear(x_tk, self.weight, None, out_tn)
        else:
            RowLinear.logits(self, x_tk, out_tn)

    def _few_rows(self) -> int:
        return _FEW_ROWS if self.num_bytes > _LARGE else _FEW_ROWS_OF_SMALL

    def _is_wide(self, num_rows: int) -> bool:
        is_between = self._few_rows() < num_rows <= _WIDE_ROWS_OF_DENSE
        return is_between and self.num_bytes > _LARGE and wide.takes(self.weight)

    def _multiply_into(self, x_tk: Tensor, out_tn: Tensor) -> None:
        torch.mm(x_tk, self.weight.T, out_dtype=torch.float32, out=out_tn)


@dataclass(slots=True)
class Int4Linear:
    """Matrices of 4 bits stacked by output rows."""

    matrix: Int4Matrix
    bias: Tensor | None  # [n]
    columns: Tensor | None  # int32 [k]: stored column j is input feature columns[j]

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.matrix.units.numel()

    def is_deferred(self, num_rows: int) -> bool:
        """Whether `parts` and `gated` are the fastest, and allowed."""
        if wide.supports(self.matrix.units.get_device()):
            return num_rows <= _WIDE_ROWS
        return num_rows <= MAX_TOKENS and few.takes(num_rows, self.matrix)

    def multiply(self, x_tk: Tensor) -> Tensor:
        """[t, n], by products of 16-bit weights."""
        out = x_tk.new_empty((x_tk.shape[0], self.out_features))
        self._multiply_unpacked(self._order(x_tk), out)
        return out if self.bias is None else out.add_(self.bias)

    def parts(self, x_tk: Tensor) -> Tensor:
        """[p, t, n] float32, to be summed over p; or finished [t, n]."""
        x_tk = self._order(x_tk)
        if single.takes(x_tk, self.matrix):
            return single.single_parts(x_tk, self.matrix, self.bias)
        if self._is_few(x_tk):
            return few.linear_parts(x_tk, self.matrix, self.bias)
        out = x_tk.new_empty((x_tk.shape[0], self.out_features))
        wide.wide_linear(x_tk, self.matrix, self.bias, out)
        return out

    def gated(self, x_tk: Tensor, activation: Activation) -> Tensor:
        """activation(first half of n) * second half → [t, f]; without a bias."""
        x_tk = self._order(x_tk)
        if single.takes(x_tk, self.matrix):
            return single.single_gated(x_tk, self.matrix, activation)
        if self._is_few(x_tk):
            return few.linear_gated(x_tk, self.matrix, activation)
        out = x_tk.new_empty((x_tk.shape[0], self.out_features // 2))
        wide.wide_gated(x_tk, self.matrix, activation, out)
        return out

    def logits(self, x_tk: Tensor, out_tn: Tensor) -> None:
        """Into float32 [t, n]."""
        x_tk = self._order(x_tk)
        if not self.is_deferred(x_tk.shape[0]):
            self._multiply_unpacked(x_tk, out_tn)
        elif single.takes(x_tk, self.matrix):
            single.single_logits(x_tk, self.matrix, out_tn)
        elif self._is_few(x_tk):
            few.linear_logits(x_tk, self.matrix, out_tn)
        else:
            wide.wide_linear(x_tk, self.matrix, None, out_tn)

    def _is_few(self, x_tk: Tensor) -> bool:
        limit = _FEW_ROWS_OF_INT4 if wide.supports(x_tk.get_device()) else MAX_TOKENS
        return x_tk.shape[0] <= limit

    def _order(self, x_tk: Tensor) -> Tensor:
        return x_tk if self.columns is None else x_tk.index_select(1, self.columns)

    def _multiply_unpacked(self, x_tk: Tensor, out_tn: Tensor) -> None:
        """Slice by slice where the matrix is large. A slice's rows are from both halves of the output."""
        half, k = self.out_features // 2, self.in_features
        num_tiles = self.matrix.units.shape[0]
        step = min(num_tiles, max(1, _UNPACKED_BYTES // (16 * k * x_tk.element_size())))
        scratch = x_tk.new_empty((2, 8 * step, k))
        if step == num_tiles:
            unpack_int4(self.matrix.units, scratch)
            _multiply_into(x_tk, scratch.view(2 * half, k), out_tn)
            return
        for tile in range(0, num_tiles, step):
            units = self.matrix.units[tile : tile + step]
            rows = 8 * units.shape[0]
            unpack_int4(units, scratch[:, :rows])
            for i in range(2):
                _multiply_into(x_tk, scratch[i, :rows], out_tn[:, i * half + 8 * tile :][:, :rows])


def _multiply_into(x_tk: Tensor, weight: Tensor, out_tn: Tensor) -> None:
    if out_tn.dtype == x_tk.dtype:
        torch.mm(x_tk, weight.T, out=out_tn)
    else:
        out_tn.copy_(torch.mm(x_tk, weight.T, out_dtype=out_tn.dtype))


@dataclass(slots=True)
class EightBitLinear(RowLinear):
    """Of 8 bits. Beyond few rows, activations are rounded to 8 bits, too."""

    matrix: EightBitMatrix
    bias: Tensor | None

    def multiply(self, x_tk: Tensor) -> Tensor:
        if self.matrix.codes.dtype != torch.int8:
            return self._multiply_fp8(x_tk, self.bias).to(x_tk.dtype)
        out = x_tk.new_empty((x_tk.shape[0], self.out_features))
        self._multiply_int8(x_tk, self.bias, out)
        return out

    def _multiply_into(self, x_tk: Tensor, out_tn: Tensor) -> None:
        if self.matrix.codes.dtype == torch.int8:
            self._multiply_int8(x_tk, None, out_tn)
        else:
            out_tn.copy_(self._multiply_fp8(x_tk, None))

    def _multiply_fp8(self, x_tk: Tensor, bias: Tensor | None) -> Tensor:
        """bfloat16, whatever x is: scales of each row go with nothing else."""
        codes, scales = self.matrix.codes, self.matrix.scales
        x_codes, x_scales = round_rows(x_tk, codes.dtype)
        product = torch._scaled_mm(x_codes, codes.T, x_scales, scales[None], out_dtype=torch.bfloat16)
        return product if bias is None else product.add_(bias)

    def _multiply_int8(self, x_tk: Tensor, bias: Tensor | None, out_tn: Tensor) -> None:
        codes, scales = self.matrix.codes, self.matrix.scales
        x_codes, x_scales = round_rows(x_tk, codes.dtype)
        rest = x_tk.shape[0] % _INT8_SLICE
        if 0 < rest < _INT8_ROWS:
            x_codes = F.pad(x_codes, (0, 0, 0, _INT8_ROWS - rest))
        # Sums are int32: those of a whole step would take more memory than its activations.
        for first in range(0, x_tk.shape[0], _INT8_SLICE):
            some = slice(first, first + _INT8_SLICE)
            out = out_tn[some]
            scale_sums(torch._int_mm(x_codes[some], codes.T)[: out.shape[0]], x_scales[some], scales, bias, out)


PackedLinear = DenseLinear | Int4Linear | EightBitLinear


@dataclass(slots=True)
class Deferred:
    """A matrix product that its consumer computes."""

    x_tk: Tensor
    linear: PackedLinear

    def parts(self) -> Tensor:
        """[p, t, n] float32, to be summed over p; or finished [t, n]."""
        return self.linear.parts(self.x_tk)
