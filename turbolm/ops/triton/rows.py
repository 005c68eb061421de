"""What a model does with one token at a time: embedding, norms, rotation, activation.

    p  parts    t  tokens    h  hidden size    f  width of the MLP    w  width of a qkv row

`parts` is the result of a matrix product: float32 partial sums [p, t, n], added up here, or finished
[t, n]. Arithmetic is float32; results are rounded once, to the dtype of `out`. Vectors of weights are
contiguous. Every function writes into tensors that it is given, and returns nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops import Activation
from turbolm.ops.triton.launch import await_inputs, layout_of_parts, load_sum, pdl_options
from turbolm.ops.triton.rotary import rotary_store

__all__ = ["activate_multiply", "add", "add_rms_norm", "embedding", "resolve_tokens", "rms_norm", "rotary_store"]

_FEW_PROGRAMS = 512  # below this a GPU has idle multiprocessors, and smaller programs finish sooner


@triton.jit
def _embedding_kernel(
    token_ids, table, out, scale, table_stride, out_stride, vocab_size, width, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """token_ids [t] → out [t, width]: BLOCK columns of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    await_inputs(PDL)
    token = tl.load(token_ids + row).to(tl.int64)
    token = tl.where((token >= 0) & (token < vocab_size), token, 0)
    values = tl.load(table + token * table_stride + column, mask=inside).to(tl.float32) * scale
    tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


def embedding(token_ids_t: Tensor, table_vh: Tensor, scale: float, out_th: Tensor) -> None:
    """Rows of the table, times `scale`. An id outside the vocabulary reads row 0: a token that could not be
    sampled is negative, and its row is thrown away later."""
    num_tokens, width = out_th.shape
    block = min(2048, triton.next_power_of_2(width))
    _embedding_kernel[(num_tokens, triton.cdiv(width, block))](
        token_ids_t, table_vh, out_th, scale, table_vh.stride(0), out_th.stride(0), table_vh.shape[0], width,
        BLOCK=block, num_warps=_warps(block, 16), **pdl_options(out_th.device),
    )  # fmt: skip


@triton.jit
def _norm_kernel(
    parts, residual, weight, out, eps, part_stride, row_stride, residual_stride, out_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [NUM_PARTS, t, WIDTH], residual [t, WIDTH] (if ADD), weight [WIDTH] → out: a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    await_inputs(PDL)
    x = load_sum(parts + row * row_stride + column, inside, part_stride, NUM_PARTS)
    if ADD:
        place = residual + row * residual_stride + column
        stored = (x + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, stored, mask=inside)
        x = stored.to(tl.float32)  # the norm of what later layers will read
    x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(out + row * out_stride + column, (x * factor).to(out.dtype.element_ty), mask=inside)


def rms_norm(x_th: Tensor, weight_h: Tensor, eps: float, out_th: Tensor, *, num_warps: int | None = None) -> None:
    """x / sqrt(mean(x²) + eps) * weight. `x_th` may be parts."""
    _norm(x_th, None, weight_h, eps, out_th, num_warps)


def add_rms_norm(
    x_parts: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float, out_th: Tensor, *, num_warps: int | None = None
) -> None:
    """residual += x in place, rounded to its dtype; out = rms_norm(residual). `num_warps` is for measurements."""
    _norm(x_parts, residual_th, weight_h, eps, out_th, num_warps)


def _norm(
    x_parts: Tensor, residual_th: Tensor | None, weight_h: Tensor, eps: float, out_th: Tensor, num_warps: int | None
) -> None:
    num_parts, num_tokens, part_stride, row_stride = layout_of_parts(x_parts)
    width = weight_h.shape[0]
    block = triton.next_power_of_2(width)
    residual = x_parts if residual_th is None else residual_th
    _norm_kernel[(num_tokens,)](
        x_parts, residual, weight_h, out_th, eps, part_stride, row_stride, residual.stride(-2), out_th.stride(0),
        WIDTH=width, BLOCK=block, NUM_PARTS=num_parts, ADD=residual_th is not None,
        num_warps=num_warps or _warps(block, 4 if num_tokens < _FEW_PROGRAMS else 8), **pdl_options(out_th.device),
    )  # fmt: skip


@triton.jit
def _add_kernel(
    parts, residual, part_stride, row_stride, residual_stride, width,
    BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [NUM_PARTS, t, width], residual [t, width]: BLOCK columns of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    await_inputs(PDL)
    x = load_sum(parts + row * row_stride + column, inside, part_stride, NUM_PARTS)
    place = residual + row * residual_stride + column
    x += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, x.to(residual.dtype.element_ty), mask=inside)


def add(x_parts: Tensor, residual_th: Tensor) -> None:
    """residual += x in place."""
    num_parts, num_tokens, part_stride, row_stride = layout_of_parts(x_parts)
    width = residual_th.shape[1]
    _add_kernel[(num_tokens, triton.cdiv(width, 1024))](
        x_parts, residual_th, part_stride, row_stride, residual_th.stride(0), width,
        BLOCK=1024, NUM_PARTS=num_parts, num_warps=4, **pdl_options(residual_th.device),
    )  # fmt: skip


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # gelu_tanh: x/2 * (1 + tanh(u)) = x * sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def _activate_multiply_kernel(
    parts, out, part_stride, row_stride, out_stride, width,
    BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [NUM_PARTS, t, 2 * width] → out [t, width]: BLOCK columns of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    await_inputs(PDL)
    pointers = parts + row * row_stride + column
    gate = load_sum(pointers, inside, part_stride, NUM_PARTS)
    up = load_sum(pointers + width, inside, part_stride, NUM_PARTS)
    tl.store(out + row * out_stride + column, (_activate(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=inside)


def activate_multiply(
    gate_up_parts: Tensor, activation: Activation, out_tf: Tensor, *, block: int | None = None
) -> None:
    """activation(first half of a row) * second half. `block` (columns per program) is for measurements."""
    num_parts, num_tokens, part_stride, row_stride = layout_of_parts(gate_up_parts)
    width = out_tf.shape[1]
    block = block or (256 if num_tokens * triton.cdiv(width, 1024) < _FEW_PROGRAMS else 1024)
    _activate_multiply_kernel[(num_tokens, triton.cdiv(width, block))](
        gate_up_parts, out_tf, part_stride, row_stride, out_tf.stride(0), width,
        BLOCK=block, NUM_PARTS=num_parts, ACTIVATION=activation,
        num_warps=_warps(block, 8 if gate_up_parts.element_size() == 2 else 4),
        **pdl_options(out_tf.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_previous"])
def _resolve_kernel(token_ids, previous, num_tokens, num_previous, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """token_ids [num_tokens] in place, from previous [num_previous]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    await_inputs(PDL)
    token = tl.load(token_ids + row, mask=row < num_tokens, other=0)
    source = -token - 1
    sampled = tl.load(previous + source, mask=(source >= 0) & (source < num_previous), other=0).to(token.dtype)
    tl.store(token_ids + row, tl.maximum(sampled, 0), mask=(row < num_tokens) & (token < 0))


def resolve_tokens(token_ids_t: Tensor, previous_r: Tensor) -> None:
    """In place: where an id is -1 - i, the token that an earlier step sampled at its row i, still on the
    device; 0 where that row has no token."""
    num_tokens = token_ids_t.shape[0]
    block = 256
    _resolve_kernel[(triton.cdiv(num_tokens, block),)](
        token_ids_t, previous_r, num_tokens, previous_r.shape[0],
        BLOCK=block, num_warps=_warps(block, 2), **pdl_options(token_ids_t.device),
    )  # fmt: skip


def _warps(num_elements: int, per_thread: int) -> int:
    """Warps of a program that handles so many elements."""
    return max(1, min(32, num_elements // (32 * per_thread)))
