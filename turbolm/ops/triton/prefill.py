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
from turbolm.ops.triton.tiles import attend_tile, find_blocks, load_keys, load_values, padded_count, padded_dim

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


@triton.jit(do_not_specialize=["num_sequences"])
def _prefill_kernel(
    q, k_pool, v_pool, tables, contexts, starts, out,
    q_stride, k_stride, v_stride, table_stride, out_stride, num_sequences, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SKIP: tl.constexpr, SKIP_MULTIPLE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, programs that the chunks need). q [·, heads * DIM] and out [·, heads * V_DIM] by rows that
    starts [num_sequences + 1] counts; tables [num_sequences, ·], contexts [num_sequences]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    index = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest contexts of a chunk first
    seqs = tl.arange(0, SEQUENCES)
    present = seqs < num_sequences
    counts = tl.load(starts + seqs + 1, mask=present, other=0) - tl.load(starts + seqs, mask=present, other=0)
    left = counts
    if SKIP > 0:
        fresh = (counts >= SKIP) & (counts == tl.load(contexts + seqs, mask=present, other=0))
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
    dim = tl.arange(0, WIDTH)
    query = tl.load(
        q + (start + token)[:, None].to(tl.int64) * q_stride + head[:, None] * DIM + dim[None, :],
        mask=wanted[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    last_visible = context - num_rows + token  # a row's own position
    nearest = context - num_rows + first_token  # of the first row
    furthest = tl.minimum(nearest + TOKENS, context)  # one past that of the last row
    table = tables + sequence.to(tl.int64) * table_stride
    keys_of_head = k_pool + kv_head * (BLOCK_SIZE * DIM)
    values_of_head = v_pool + kv_head * (BLOCK_SIZE * V_DIM)
    offset = tl.arange(0, TILE)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, V_WIDTH), tl.float32)
    if WINDOW > 0:
        diagonal = tl.maximum(nearest - WINDOW + 1, 0) // TILE
    else:
        diagonal = (nearest + 1) // TILE  # tiles before this one are seen whole by every row
        block = find_blocks(table, 0, context, BLOCK_SIZE, TILE)
        for tile in range(diagonal):
            position = tile * TILE + offset
            valid = position < context
            keys = load_keys(keys_of_head, block, position, valid, k_stride, BLOCK_SIZE, DIM, WIDTH, False)
            values = load_values(values_of_head, block, position, valid, v_stride, BLOCK_SIZE, V_DIM, V_WIDTH, False)
            block = find_blocks(table, (tile + 1) * TILE, context, BLOCK_SIZE, TILE)
            peak, total, mixed = attend_tile(query, keys, values, valid, peak, total, mixed, scale, SOFTCAP, False)
    block = find_blocks(table, diagonal * TILE, context, BLOCK_SIZE, TILE)
    for tile in range(diagonal, tl.cdiv(furthest, TILE)):
        position = tile * TILE + offset
        valid = position < context
        keys = load_keys(keys_of_head, block, position, valid, k_stride, BLOCK_SIZE, DIM, WIDTH, True)
        values = load_values(values_of_head, block, position, valid, v_stride, BLOCK_SIZE, V_DIM, V_WIDTH, True)
        block = find_blocks(table, (tile + 1) * TILE, context, BLOCK_SIZE, TILE)
        visible = valid[None, :] & (position[None, :] <= last_visible[:, None])
        if WINDOW > 0:
            visible &= position[None, :] > last_visible[:, None] - WINDOW
        peak, total, mixed = attend_tile(query, keys, values, visible, peak, total, mixed, scale, SOFTCAP, True)

    wide = tl.arange(0, V_WIDTH)
    result = mixed / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out + (start + token)[:, None].to(tl.int64) * out_stride + head[:, None] * V_DIM + wide[None, :],
        result.to(out.dtype.element_ty),
        mask=wanted[:, None] & (wide < V_DIM)[None, :],
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
    _prefill_kernel[(spec.num_kv_heads, needed)](
        qkv_tw, cache.k, cache.v, block_tables, context_lens, query_start, out,
        qkv_tw.stride(0), cache.k.stride(0), cache.v.stride(0), block_tables.stride(0), out.stride(0),
        len(chunks), spec.scale, GROUP=group, DIM=spec.head_dim, V_DIM=spec.v_head_dim, BLOCK_SIZE=cache.block_size,
        WINDOW=spec.window or 0, SOFTCAP=spec.softcap or 0.0, SKIP=skip, SKIP_MULTIPLE=MULTIPLE, ROWS=plan.rows,
        TILE=plan.tile, WIDTH=padded_dim(spec.head_dim), V_WIDTH=padded_dim(spec.v_head_dim),
        SEQUENCES=padded_count(len(chunks)), PDL=pdl, num_warps=plan.num_warps, num_stages=plan.num_stages,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
