"""Activations of 8 bits: rounded by rows before a product, scaled back after it.

t  rows of x    n, k  out and in features
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.launch import await_inputs, pdl_options

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _round_kernel(x, codes, scales, row_stride, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x [t, width] → codes [t, width], scales [t]: a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    await_inputs(PDL)
    values = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-10) / LARGEST
    values = values / scale
    if LARGEST == 127:
        values = tl.floor(values + 0.5)
    tl.store(codes + row * width + column, values.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def round_rows(x_tk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """→ codes [t, k] in `dtype` (int8 or float8_e4m3fn), scales float32 [t, 1]: the largest of a row becomes the
    largest code."""
    num_rows, width = x_tk.shape
    codes = torch.empty((num_rows, width), dtype=dtype, device=x_tk.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x_tk.device)
    block = triton.next_power_of_2(width)
    _round_kernel[(num_rows,)](
        x_tk, codes, scales, x_tk.stride(0), width,
        LARGEST=_LARGEST[dtype], BLOCK=block, num_warps=max(1, min(16, block // 512)), **pdl_options(x_tk.device),
    )  # fmt: skip
    return codes, scales


@triton.jit
def _scale_kernel(
    sums, row_scales, scales, bias, out, width, out_stride,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """sums [t, width] → out [t, width]: BLOCK columns of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(scales + column, mask=inside, other=0.0)
    await_inputs(PDL)
    value = (
        tl.load(sums + row * width + column, mask=inside, other=0).to(tl.float32) * scale * tl.load(row_scales + row)
    )
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def scale_sums(sums_tn: Tensor, row_scales_t1: Tensor, scales_n: Tensor, bias_n: Tensor | None, out_tn: Tensor) -> None:
    """int32 sums * row_scales * scales + bias into `out`, in its dtype."""
    num_rows, width = sums_tn.shape
    _scale_kernel[(num_rows, triton.cdiv(width, 1024))](
        sums_tn, row_scales_t1, scales_n, scales_n if bias_n is None else bias_n, out_tn, width, out_tn.stride(0),
        HAS_BIAS=bias_n is not None, BLOCK=1024, num_warps=4, **pdl_options(out_tn.device),
    )  # fmt: skip
