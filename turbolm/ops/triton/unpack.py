"""Weights of 4 bits, in the layout of `turbolm.ops.cuda.int4`, to the dtype of activations."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.launch import await_inputs, pdl_options

_CODE_WORDS = 256  # of a unit: 16 rows by 128 columns


@triton.jit
def _unpack_kernel(
    words, out, num_units, half_stride, row_stride,
    UNIT_WORDS: tl.constexpr, GROUPS: tl.constexpr, CODE_WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """words [tiles, units, UNIT_WORDS] → out [2, 8 * tiles, 128 * units]: a unit per program."""
    unit, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 128)[None, :]
    # kernels/int4.cuh: word (half, lane (g, c), step) of the codes, nibble (row / 8) + 2 (k / 8 % 2) + 4 (k % 2) there
    place = column // 64 * 128 + (row % 8 * 4 + column % 8 // 2) * 4 + column // 16 % 4
    shift = (row // 8 + column // 8 % 2 * 2 + column % 2 * 4) * 4
    source = words + (tile * num_units + unit) * UNIT_WORDS
    code = (tl.load(source + place) >> shift) & 15
    scale_word = tl.load(source + CODE_WORDS + column // (128 // GROUPS) * 16 + row % 8 * 2 + row // 8)
    scale = (scale_word & -32).to(tl.float32, bitcast=True)
    value = (code - (scale_word & 31)).to(tl.float32) * scale
    target = row // 8 * half_stride + (tile * 8 + row % 8) * row_stride + unit * 128 + column
    await_inputs(PDL)  # the weights are constant
    tl.store(out + target, value.to(out.dtype.element_ty))


def unpack_int4(units: Tensor, out: Tensor) -> None:
    """units uint8 [n/16, k/128, b] → out [2, n/2, k]: the first and the second half of the matrix's rows."""
    num_tiles, num_units, num_bytes = units.shape
    _unpack_kernel[(num_units, num_tiles)](
        units.view(torch.int32), out, num_units, out.stride(0), out.stride(1),
        UNIT_WORDS=num_bytes // 4, GROUPS=(num_bytes // 4 - _CODE_WORDS) // 16, CODE_WORDS=_CODE_WORDS,
        num_warps=4, **pdl_options(out.device),
    )  # fmt: skip
