"""Between the qkv projection and attention: q and k normalized and rotated, k and v into the cache.

A program finishes a few heads of one token, all of q, all of k or all of v; a head is held as a whole
(rotated halves and the rest), so that a cache of a narrower format can find a scale per head and token
and store k and v through it, in `_store`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops.triton.launch import await_inputs, layout_of_parts, load_sum, pdl_options

_MANY_PROGRAMS = 1024  # with more, programs of more heads cost less


@triton.jit
def _store(out, pool, first_column, pool_offset, is_head, is_stored, dim, inside, x, STORE: tl.constexpr):
    """x [heads, dims] to a row of `out`, and to the cache (if STORE)."""
    mask = is_head[:, None] & inside[None, :]
    tl.store(out + first_column[:, None] + dim[None, :], x.to(out.dtype.element_ty), mask=mask)
    if STORE:
        pointers = pool + pool_offset[:, None] + dim[None, :]
        tl.store(pointers, x.to(pool.dtype.element_ty), mask=mask & is_stored)


@triton.jit
def _finish_heads(
    parts, out, norm, cos, sin, positions, slots, pool, part_stride, block_stride, head_stride, token_stride, eps,
    row, first_head, column, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, STORE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Heads first_head … of a token's q, k or v. `parts` and `out` point at the token's row, whose `column`
    is the first of head 0."""
    head = first_head + tl.arange(0, HEADS)
    is_head = head < NUM_HEADS
    start = column + head * DIM
    HALF: tl.constexpr = ROTARY_DIM // 2
    if ROTARY_DIM > 0:
        pair = tl.arange(0, triton.next_power_of_2(HALF))
        in_half = pair < HALF
        dim_a = 2 * pair if INTERLEAVED else pair
        dim_b = 2 * pair + 1 if INTERLEAVED else pair + HALF
    if ROTARY_DIM < DIM:
        dim_c = ROTARY_DIM + tl.arange(0, triton.next_power_of_2(DIM - ROTARY_DIM))
        in_rest = dim_c < DIM
    if NORM:
        if ROTARY_DIM > 0:
            norm_a = tl.load(norm + dim_a, mask=in_half, other=0.0).to(tl.float32)
            norm_b = tl.load(norm + dim_b, mask=in_half, other=0.0).to(tl.float32)
        if ROTARY_DIM < DIM:
            norm_c = tl.load(norm + dim_c, mask=in_rest, other=0.0).to(tl.float32)
    await_inputs(PDL)
    offset = tl.zeros((HEADS,), tl.int64)
    is_stored = True
    if STORE:
        slot = tl.load(slots + row).to(tl.int64)
        is_stored = slot >= 0
        slot = tl.maximum(slot, 0)
        offset = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride + head * head_stride
    if ROTARY_DIM > 0:
        angle = tl.load(positions + row).to(tl.int64) * HALF + pair
        c = tl.load(cos + angle, mask=in_half, other=0.0)
        s = tl.load(sin + angle, mask=in_half, other=0.0)
        mask = is_head[:, None] & in_half[None, :]
        a = load_sum(parts + start[:, None] + dim_a[None, :], mask, part_stride, NUM_PARTS)
        b = load_sum(parts + start[:, None] + dim_b[None, :], mask, part_stride, NUM_PARTS)
    if ROTARY_DIM < DIM:
        mask = is_head[:, None] & in_rest[None, :]
        rest = load_sum(parts + start[:, None] + dim_c[None, :], mask, part_stride, NUM_PARTS)
    if NORM:
        squares = tl.zeros((HEADS,), tl.float32)
        if ROTARY_DIM > 0:
            squares += tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if ROTARY_DIM < DIM:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        if ROTARY_DIM > 0:
            a *= scale * norm_a[None, :]
            b *= scale * norm_b[None, :]
        if ROTARY_DIM < DIM:
            rest *= scale * norm_c[None, :]
    if ROTARY_DIM > 0:
        rotated_a = a * c[None, :] - b * s[None, :]
        rotated_b = b * c[None, :] + a * s[None, :]
        _store(out, pool, start, offset, is_head, is_stored, dim_a, in_half, rotated_a, STORE)
        _store(out, pool, start, offset, is_head, is_stored, dim_b, in_half, rotated_b, STORE)
    if ROTARY_DIM < DIM:
        _store(out, pool, start, offset, is_head, is_stored, dim_c, in_rest, rest, STORE)


@triton.jit
def _rotary_store_kernel(
    parts, out, q_norm, k_norm, cos, sin, positions, slots, k_pool, v_pool,
    part_stride, row_stride, out_stride, k_block_stride, k_head_stride, k_token_stride,
    v_block_stride, v_head_stride, v_token_stride, eps,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [NUM_PARTS, t, w] → out [t, w] and the pools: HEADS heads of a token per program."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    Q_GROUPS: tl.constexpr = triton.cdiv(NUM_HEADS, HEADS)
    KV_GROUPS: tl.constexpr = triton.cdiv(KV_HEADS, HEADS)
    source = parts + row * row_stride
    target = out + row * out_stride
    if group < Q_GROUPS:
        _finish_heads(
            source, target, q_norm, cos, sin, positions, slots, k_pool, part_stride, 0, 0, 0, eps,
            row, group * HEADS, 0, NUM_HEADS, DIM, ROTARY_DIM, INTERLEAVED, Q_NORM, False, BLOCK_SIZE,
            NUM_PARTS, HEADS, PDL,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        _finish_heads(
            source, target, k_norm, cos, sin, positions, slots, k_pool, part_stride,
            k_block_stride, k_head_stride, k_token_stride, eps,
            row, (group - Q_GROUPS) * HEADS, NUM_HEADS * DIM, KV_HEADS, DIM, ROTARY_DIM, INTERLEAVED, K_NORM, True,
            BLOCK_SIZE, NUM_PARTS, HEADS, PDL,
        )  # fmt: skip
    else:
        _finish_heads(
            source, target, k_norm, cos, sin, positions, slots, v_pool, part_stride,
            v_block_stride, v_head_stride, v_token_stride, eps,
            row, (group - Q_GROUPS - KV_GROUPS) * HEADS, (NUM_HEADS + KV_HEADS) * DIM, KV_HEADS, V_DIM, 0, False,
            False, True, BLOCK_SIZE, NUM_PARTS, HEADS, PDL,
        )  # fmt: skip


def rotary_store(
    qkv_parts: Tensor,
    positions_t: Tensor,
    slots_t: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    rope: RopeTable | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out_tw: Tensor,
    *,
    heads: int | None = None,
) -> None:
    """q, k and v, summed over the parts (the bias is in them), with per-head RMSNorm of q and k (weights
    [head_dim], if given) and rotation by position, into out [t, w] (which may be `qkv_parts` itself, if that
    is finished); k and v also into the cache at their slots, -1: not. `heads` per program is for measurements."""
    num_parts, num_tokens, part_stride, row_stride = layout_of_parts(qkv_parts)
    heads = heads or _heads_per_program(num_tokens, spec)
    groups = triton.cdiv(spec.num_heads, heads) + 2 * triton.cdiv(spec.num_kv_heads, heads)
    width = triton.next_power_of_2(max(spec.head_dim, spec.v_head_dim))
    cos, sin = (out_tw, out_tw) if rope is None else (rope.cos, rope.sin)
    assert rope is None or (cos.is_contiguous() and sin.is_contiguous())
    _rotary_store_kernel[(num_tokens, groups)](
        qkv_parts, out_tw, out_tw if q_norm is None else q_norm, out_tw if k_norm is None else k_norm, cos, sin,
        positions_t, slots_t, cache.k, cache.v, part_stride, row_stride, out_tw.stride(0),
        *cache.k.stride()[:3], *cache.v.stride()[:3], eps,
        NUM_HEADS=spec.num_heads, KV_HEADS=spec.num_kv_heads, DIM=spec.head_dim, V_DIM=spec.v_head_dim,
        ROTARY_DIM=0 if rope is None else rope.rotary_dim, INTERLEAVED=rope is not None and rope.interleaved,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, BLOCK_SIZE=cache.block_size, NUM_PARTS=num_parts,
        HEADS=heads, num_warps=max(1, min(8, heads * width // 512)), **pdl_options(out_tw.device),
    )  # fmt: skip


def _heads_per_program(num_tokens: int, spec: AttentionSpec) -> int:
    num_heads = num_tokens * (spec.num_heads + 2 * spec.num_kv_heads)
    heads = 1
    while heads < 8 and num_heads > heads * _MANY_PROGRAMS:
        heads *= 2
    return heads
