"""Paged attention of many new tokens per sequence: causal, ragged, over cached context or none.

Flash attention (Dao et al., 2022). A program holds ROWS query rows, which are all query heads of a kv head
for ROWS / group tokens, and walks over the tiles of K and V that they see: first those that every row sees
whole, without masks, then those on the diagonal.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.triton.launch import await_inputs
from turbolm.ops.triton.tiles import (
    attend_tile,
    dimension_of,
    find_blocks,
    finish,
    load_query,
    load_tile,
    padded_count,
    padded_dim,
    shapes,
    stored,
    value_offsets,
)

MULTIPLE = 256  # the leading rows that `skip` leaves out are a multiple of this


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How the prefill kernel runs. The defaults of `plan_prefill` are the rule; others are for measurements."""

    rows: int  # of queries (tokens x heads of a group) per program
    tile: int  # positions of K and V per step
    num_warps: int
    num_stages: int  # of the pipeline of loads


def plan_prefill(spec: AttentionSpec, element_size: int, shared_memory: int, longest: int) -> PrefillPlan:
    """The rule: 128 rows where a chunk of `longest` tokens has that many, in at most `shared_memory` bytes."""
    width, v_width = padded_dim(spec.head_dim), padded_dim(spec.v_head_dim)
    group = spec.num_heads // spec.num_kv_heads
    fewest = max(16, triton.next_power_of_2(group))
    most = max(fewest, triton.next_power_of_2(longest * group))
    tile = 64 if width + v_width <= 256 else 32
    for rows, num_stages in ((128, 3), (128, 2), (64, 2), (32, 2), (16, 2), (16, 1)):
        rows = max(fewest, min(rows, most))  # noqa: PLW2901
        # queries, weights on their way to the second product, and tiles under way
        used = (rows * (width + tile) + num_stages * tile * (width + v_width)) * element_size
        if used <= shared_memory:
            break
    return PrefillPlan(rows, tile, 8 if rows >= 128 else 4, num_stages)


def skipped_rows(num_rows: int, context: int, skip: int) -> int:
    """Leading rows of a chunk that the kernel leaves to another: of chunks without cached context and with at
    least `skip` rows (0: none), the whole multiples of MULTIPLE. The kernel applies the same rule."""
    return num_rows // MULTIPLE * MULTIPLE if 0 < skip <= num_rows == context else 0


# The arrays of a step's sequences begin anywhere: a variant for each alignment would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["num_sequences", "table_stride", "skip"],
    do_not_specialize_on_alignment=["tables", "contexts", "starts"],
)
def _prefill_kernel(
    q, k_pool, v_pool, k_scales, v_scales, tables, contexts, starts, out,
    q_stride, k_stride, v_stride, table_stride, out_stride, num_sequences, skip, scale,
    GROUP: tl.constexpr, SKIP_MULTIPLE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SEQUENCES: tl.constexpr, PDL: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, K_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, V_COLUMNS: tl.constexpr, V_WIDTH: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, programs that the chunks need). q [·, heads * DIM] and out [·, heads * V_DIM] by rows that
    starts [num_sequences + 1] counts; tables [num_sequences, ·], contexts [num_sequences]."""
    await_inputs(PDL)
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest contexts of a chunk first
    seqs = tl.arange(0, SEQUENCES)
    present = seqs < num_sequences
    counts = tl.load(starts + seqs + 1, mask=present, other=0) - tl.load(starts + seqs, mask=present, other=0)
    fresh = (skip > 0) & (counts >= skip) & (counts == tl.load(contexts + seqs, mask=present, other=0))
    left = tl.where(fresh, counts % SKIP_MULTIPLE, counts)
    needed = tl.cdiv(left, TOKENS)
    sequence = tl.sum((tl.cumsum(needed, 0) <= index).to(tl.int32), 0)
    index -= tl.sum(tl.where(seqs < sequence, needed, 0), 0)

    start = tl.load(starts + sequence)
    num_rows = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    first_token = index * TOKENS + num_rows - tl.sum(tl.where(seqs == sequence, left, 0), 0)
    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    wanted = (token < num_rows) & (row < TOKENS * GROUP)
    head = kv_head * GROUP + row % GROUP
    pointers = q + (start + token).to(tl.int64) * q_stride + head * DIM
    query, query_sum, largest = load_query(pointers, wanted, DIM, K_COLUMNS, WIDTH, K_KIND)
    scale *= largest
    last_visible = context - num_rows + token  # a row's own position
    nearest = context - num_rows + first_token  # of the first row
    furthest = tl.minimum(nearest + TOKENS, context)  # one past that of the last row
    table = tables + sequence.to(tl.int64) * table_stride
    k_pool += kv_head * (BLOCK_SIZE * K_COLUMNS)
    v_pool += kv_head * ((BLOCK_SIZE if V_KIND == 0 else BLOCK_SIZE // 2) * V_COLUMNS)
    k_scales += kv_head * BLOCK_SIZE
    v_scales += kv_head * BLOCK_SIZE
    offset = tl.arange(0, TILE)
    value_offset = value_offsets(TILE, V_KIND)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS, V_WIDTH), tl.float32)
    high = tl.zeros((ROWS, V_WIDTH), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    if WINDOW > 0:
        diagonal = tl.maximum(nearest - WINDOW + 1, 0) // TILE
    else:
        diagonal = (nearest + 1) // TILE  # tiles before this one are seen whole by every row
        block = find_blocks(table, 0, offset, context, BLOCK_SIZE, TILE)
        value_block = find_blocks(table, 0, value_offset, context, BLOCK_SIZE, TILE)
        for tile in range(diagonal):
            first = tile * TILE
            keys, key_scales, values, value_scales = load_tile(
                k_pool, v_pool, k_scales, v_scales, block, value_block, first + offset, first + value_offset,
                context, k_stride, v_stride, KV_HEADS, BLOCK_SIZE, K_COLUMNS, WIDTH, V_COLUMNS, V_WIDTH, False,
                K_KIND, V_KIND,
            )  # fmt: skip
            block = find_blocks(table, first + TILE, offset, context, BLOCK_SIZE, TILE)
            value_block = find_blocks(table, first + TILE, value_offset, context, BLOCK_SIZE, TILE)
            peak, total, low, high, rest = attend_tile(
                query, query_sum, keys, key_scales, values, value_scales, True, peak, total, low, high, rest,
                scale, SOFTCAP, False, K_KIND, V_KIND,
            )  # fmt: skip
    block = find_blocks(table, diagonal * TILE, offset, context, BLOCK_SIZE, TILE)
    value_block = find_blocks(table, diagonal * TILE, value_offset, context, BLOCK_SIZE, TILE)
    for tile in range(diagonal, tl.cdiv(furthest, TILE)):
        first = tile * TILE
        keys, key_scales, values, value_scales = load_tile(
            k_pool, v_pool, k_scales, v_scales, block, value_block, first + offset, first + value_offset, context,
            k_stride, v_stride, KV_HEADS, BLOCK_SIZE, K_COLUMNS, WIDTH, V_COLUMNS, V_WIDTH, True, K_KIND, V_KIND,
        )  # fmt: skip
        block = find_blocks(table, first + TILE, offset, context, BLOCK_SIZE, TILE)
        value_block = find_blocks(table, first + TILE, value_offset, context, BLOCK_SIZE, TILE)
        position = first + offset
        visible = (position < context)[None, :] & (position[None, :] <= last_visible[:, None])
        if WINDOW > 0:
            visible &= position[None, :] > last_visible[:, None] - WINDOW
        peak, total, low, high, rest = attend_tile(
            query, query_sum, keys, key_scales, values, value_scales, visible, peak, total, low, high, rest,
            scale, SOFTCAP, True, K_KIND, V_KIND,
        )  # fmt: skip

    result = finish(low, high, rest, V_KIND) / tl.where(total == 0, 1.0, total)[:, None]
    dim = dimension_of(tl.arange(0, result.shape[1]), V_DIM, V_KIND)
    tl.store(
        out + (start + token)[:, None].to(tl.int64) * out_stride + head[:, None] * V_DIM + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=wanted[:, None] & (dim >= 0)[None, :],
    )


def prefill_attention(
    qkv_tw: Tensor,
    query_start: Tensor,
    chunks: Sequence[tuple[int, int, int]],
    block_tables: Tensor,
    context_lens: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    out: Tensor,
    *,
    plan: PrefillPlan,
    skip: int = 0,
    pdl: bool = False,
) -> None:
    """Causal attention of each chunk's rows over its sequence's cached context (which includes them), into `out`.

    qkv_tw [t, >= q_width] (q first; any row stride); query_start [s + 1], context_lens [s] and block_tables
    [s, b] int32 of the chunks' sequences, with `chunks` (first row, rows, context) saying the same on the
    host; out [t, num_heads * v_head_dim] (any row stride). skip: see `skipped_rows`.
    """
    group = spec.num_heads // spec.num_kv_heads
    tokens = plan.rows // group
    needed = sum(triton.cdiv(rows - skipped_rows(rows, context, skip), tokens) for _, rows, context in chunks)
    if needed == 0:
        return
    (k, k_scales), (v, v_scales) = stored(cache.k, cache.k_scales), stored(cache.v, cache.v_scales)
    _prefill_kernel[(spec.num_kv_heads, needed)](
        qkv_tw, k, v, k_scales, v_scales, block_tables, context_lens, query_start, out,
        qkv_tw.stride(0), k.stride(0), v.stride(0), block_tables.stride(0), out.stride(0),
        len(chunks), skip, spec.scale, GROUP=group, SKIP_MULTIPLE=MULTIPLE, ROWS=plan.rows, TILE=plan.tile,
        SEQUENCES=padded_count(len(chunks)), PDL=pdl, num_warps=plan.num_warps, num_stages=plan.num_stages,
        **shapes(cache, spec), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
