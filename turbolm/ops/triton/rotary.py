"""Between the qkv projection and attention: q and k normalized and rotated, k and v into the cache.

A program finishes a few heads of one token, all of q, all of k or all of v. What the cache keeps as codes is
read back from the finished row, which the program has just written: there a head is whole, rounded as the
reference rounds it, and its halves lie where int4 wants them.

Codes of k lie as `LayerCache` says. Those of v lie side by side for two tokens, byte by byte, so that
attention reads 16-bit numbers down the tokens, as its products want them (`tiles.py`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.kv import LEVELS, KvKind
from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops.triton.launch import await_inputs, layout_of_parts, load_sum, pdl_options

_MANY_PROGRAMS = 1024  # with more, programs of more heads cost less
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2**23)  # plus a small float32: it, rounded half to even, in the low bits


@triton.jit
def _store(out, pool, first_column, pool_offset, is_head, is_stored, dim, inside, x, STORE: tl.constexpr):
    """x [heads, dims] to a row of `out`, and to the cache (if STORE)."""
    mask = is_head[:, None] & inside[None, :]
    tl.store(out + first_column[:, None] + dim[None, :], x.to(out.dtype.element_ty), mask=mask)
    if STORE:
        pointers = pool + pool_offset[:, None] + dim[None, :]
        tl.store(pointers, x.to(pool.dtype.element_ty), mask=mask & is_stored)


@triton.jit
def _code(x, scale, minimum, LEVEL: tl.constexpr):
    """(x - minimum) / scale, rounded half to even, in 0 … LEVEL, as int32; 0 where scale is 0."""
    divisor = tl.where(scale == 0, float("inf"), scale)
    code = tl.div_rn(x - minimum[:, None], tl.broadcast_to(divisor[:, None], x.shape))
    code = tl.minimum(tl.maximum(code, 0.0), LEVEL)
    return (code + _ROUND).to(tl.int32, bitcast=True) & 255


@triton.jit
def _fp8(x):
    """The bits of x as float8 e4m3, rounded half to even and saturated, as int32. (Triton's own conversion is wrong
    in its interpreter.)"""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    subnormal = (size * 512 + _ROUND).to(tl.int32, bitcast=True) & 255  # in units of 2^-9
    exact = size.to(tl.int32, bitcast=True)
    normal = ((exact + 0x7FFFF + ((exact >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    return tl.where(size < 2.0**-6, subnormal, normal) | ((bits >> 24) & 128)


@triton.jit
def _store_codes(
    heads, pool, scales, fixed, slot, head, is_head, block_stride, head_stride, DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, LEVEL: tl.constexpr, FIXED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """`heads` [head] point at heads of DIM finished numbers; their codes go to `pool` (bytes), and where there are
    such, scales and minimums to `scales` [blocks, NUM_HEADS, BLOCK_SIZE, 2]. LEVEL: the largest code; 0: fp8.
    FIXED: those are its head's in `fixed` [NUM_HEADS, 2]. PAIRED: two tokens side by side."""
    HALF: tl.constexpr = DIM // 2
    index = tl.arange(0, triton.next_power_of_2(HALF))
    mask = is_head[:, None] & (index < HALF)[None, :]
    pointers = heads[:, None] + index[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    if LEVEL == 0:
        first, second = _fp8(first), _fp8(second)
    else:
        if FIXED:
            scale = tl.load(fixed + head * 2, mask=is_head, other=1.0)
            minimum = tl.load(fixed + head * 2 + 1, mask=is_head, other=0.0)
        else:
            low = tl.where(is_head, tl.min(tl.where(mask, tl.minimum(first, second), float("inf")), 1), 0.0)
            high = tl.where(is_head, tl.max(tl.where(mask, tl.maximum(first, second), float("-inf")), 1), 0.0)
            scale = tl.div_rn(high - low, tl.full(low.shape, LEVEL, tl.float32)).to(tl.float16)
            minimum = low.to(tl.float16)
        at = scales + ((slot // BLOCK_SIZE * NUM_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * 2
        tl.store(at, scale, mask=is_head)
        tl.store(at + 1, minimum, mask=is_head)
        first = _code(first, scale.to(tl.float32), minimum.to(tl.float32), LEVEL)
        second = _code(second, scale.to(tl.float32), minimum.to(tl.float32), LEVEL)
    ROW: tl.constexpr = HALF if LEVEL == 15 else DIM
    token = slot % BLOCK_SIZE
    STEP: tl.constexpr = 2 if PAIRED else 1
    base = token // STEP * (STEP * ROW) + token % STEP
    base += slot // BLOCK_SIZE * block_stride
    target = pool + (base + head * head_stride)[:, None] + index[None, :] * STEP
    if LEVEL == 15:
        tl.store(target, (first | second << 4).to(tl.uint8), mask=mask)
    else:
        tl.store(target, first.to(tl.uint8), mask=mask)
        tl.store(target + HALF * STEP, second.to(tl.uint8), mask=mask)


@triton.jit
def _finish_heads(
    parts, out, norm, cos, sin, positions, slots, pool, scales, fixed, part_stride, block_stride, head_stride,
    token_stride, eps, row, first_head, column, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, CACHED: tl.constexpr, LEVEL: tl.constexpr, FIXED: tl.constexpr,
    PAIRED: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_PARTS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Heads first_head … of a token's q, k or v. `parts` and `out` point at the token's row, whose `column`
    is the first of head 0. CACHED: they go to the cache; as numbers if LEVEL is below 0, else as codes."""
    STORE: tl.constexpr = CACHED and LEVEL < 0
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
    # Positions and slots are older than the kernel before.
    offset = tl.zeros((HEADS,), tl.int64)
    is_stored = True
    if CACHED:
        slot = tl.load(slots + row).to(tl.int64)
        is_stored = slot >= 0
        slot = tl.maximum(slot, 0)
        offset = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride + head * head_stride
    if ROTARY_DIM > 0:
        angle = tl.load(positions + row).to(tl.int64) * HALF + pair
        c = tl.load(cos + angle, mask=in_half, other=0.0)
        s = tl.load(sin + angle, mask=in_half, other=0.0)
    await_inputs(PDL)
    if ROTARY_DIM > 0:
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
    if CACHED and LEVEL >= 0:
        tl.debug_barrier()  # the row is read by other threads than wrote it
        _store_codes(
            out + start, pool, scales, fixed, slot, head, is_head & is_stored, block_stride, head_stride, DIM,
            NUM_HEADS, BLOCK_SIZE, LEVEL, FIXED, PAIRED,
        )  # fmt: skip


@triton.jit
def _rotary_store_kernel(
    parts, out, q_norm, k_norm, cos, sin, positions, slots, k_pool, v_pool, k_scales, v_scales, k_range, v_range,
    part_stride, row_stride, out_stride, k_block_stride, k_head_stride, k_token_stride,
    v_block_stride, v_head_stride, v_token_stride, eps,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, K_LEVEL: tl.constexpr,
    V_LEVEL: tl.constexpr, K_FIXED: tl.constexpr, V_FIXED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
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
            source, target, q_norm, cos, sin, positions, slots, k_pool, k_scales, k_range, part_stride, 0, 0, 0,
            eps, row, group * HEADS, 0, NUM_HEADS, DIM, ROTARY_DIM, INTERLEAVED, Q_NORM, False, K_LEVEL, K_FIXED, False,
            BLOCK_SIZE, NUM_PARTS, HEADS, PDL,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        _finish_heads(
            source, target, k_norm, cos, sin, positions, slots, k_pool, k_scales, k_range, part_stride,
            k_block_stride, k_head_stride, k_token_stride, eps,
            row, (group - Q_GROUPS) * HEADS, NUM_HEADS * DIM, KV_HEADS, DIM, ROTARY_DIM, INTERLEAVED, K_NORM, True,
            K_LEVEL, K_FIXED, False, BLOCK_SIZE, NUM_PARTS, HEADS, PDL,
        )  # fmt: skip
    else:
        _finish_heads(
            source, target, k_norm, cos, sin, positions, slots, v_pool, v_scales, v_range, part_stride,
            v_block_stride, v_head_stride, v_token_stride, eps,
            row, (group - Q_GROUPS - KV_GROUPS) * HEADS, (NUM_HEADS + KV_HEADS) * DIM, KV_HEADS, V_DIM, 0, False,
            False, True, V_LEVEL, V_FIXED, True, BLOCK_SIZE, NUM_PARTS, HEADS, PDL,
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
    k_pool, v_pool = (pool.view(torch.uint8) if pool.itemsize == 1 else pool for pool in (cache.k, cache.v))
    _rotary_store_kernel[(num_tokens, groups)](
        qkv_parts, out_tw, out_tw if q_norm is None else q_norm, out_tw if k_norm is None else k_norm, cos, sin,
        positions_t, slots_t, k_pool, v_pool, out_tw if cache.k_scales is None else cache.k_scales,
        out_tw if cache.v_scales is None else cache.v_scales, out_tw if cache.k_range is None else cache.k_range,
        out_tw if cache.v_range is None else cache.v_range, part_stride, row_stride, out_tw.stride(0),
        *cache.k.stride()[:3], *cache.v.stride()[:3], eps,
        NUM_HEADS=spec.num_heads, KV_HEADS=spec.num_kv_heads, DIM=spec.head_dim, V_DIM=spec.v_head_dim,
        ROTARY_DIM=0 if rope is None else rope.rotary_dim, INTERLEAVED=rope is not None and rope.interleaved,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
        K_LEVEL=_level(cache.kind_k), V_LEVEL=_level(cache.kind_v),
        K_FIXED=cache.k_range is not None, V_FIXED=cache.v_range is not None,
        BLOCK_SIZE=cache.block_size, NUM_PARTS=num_parts, HEADS=heads, num_warps=max(1, min(8, heads * width // 512)),
        **pdl_options(out_tw.device),
    )  # fmt: skip


def _level(kind: KvKind) -> int:
    """The largest code; 0: fp8, -1: numbers as they are."""
    return 0 if kind == "fp8" else LEVELS.get(kind, -1)


def _heads_per_program(num_tokens: int, spec: AttentionSpec) -> int:
    num_heads = num_tokens * (spec.num_heads + 2 * spec.num_kv_heads)
    heads = 1
    while heads < 8 and num_heads > heads * _MANY_PROGRAMS:
        heads *= 2
    return heads
