"""Paged attention of few new tokens per sequence over long contexts: decoding, and checking drafts.

Memory-bound: every byte of K and V is read once, by the program that serves all query heads of a kv head.
The work of a step, all tiles of all (sequence, kv head) pairs laid end to end, is cut into equal shares,
one per program (stream-K: Osama et al., 2023), so that long and short contexts balance and the grid
depends on no length. A cut near the border of two pairs moves there: what a share wins is less than what
it costs to put a pair together. A pair that cuts do divide is put together by the program that finishes
last, in the order of the context: results are deterministic.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.triton.tiles import attend_tile, find_blocks, load_keys, load_values, padded_count, padded_dim


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the decode kernel runs. The defaults of `plan_decode` are the rule; others are for measurements."""

    tile: int  # positions of K and V per step of a program
    programs: int  # shares that the work is cut into, at most
    num_warps: int
    num_stages: int  # of the pipeline of loads
    least: int = 8  # tiles of a share, unless all pairs have fewer
    snap: int = 4  # tiles that a cut moves at most
    flat: bool = False  # one pipeline of loads over all pairs of a share
    registers: int | None = None  # of a thread, at most


def plan_decode(spec: AttentionSpec, element_size: int, num_sms: int, shared_memory: int) -> DecodePlan:
    """The rule: tiles of 64 positions, and as many programs as run at once on a GPU of num_sms multiprocessors
    with `shared_memory` bytes each, so that no share waits for another."""
    width = padded_dim(spec.head_dim) + padded_dim(spec.v_head_dim)
    tile = 64 if width <= 256 else 32
    num_warps, num_stages = 4, 3
    used = (num_stages - 1) * tile * width * element_size + 16 * (width + tile) * element_size + 1024
    return DecodePlan(tile, num_sms * max(1, min(3, shared_memory // used)), num_warps, num_stages)


@triton.jit
def _cut_of(wanted, work, tiles_s, ends_s, seqs, snap, KV_HEADS: tl.constexpr):
    """A cut of the work, moved to the border of two pairs if it's near; its sequence, that one's first unit, and
    how many tiles of a pair come before the cut."""
    is_before = ends_s <= wanted
    sequence = tl.sum(is_before.to(tl.int32), 0)
    sequence_start = tl.sum(tl.where(is_before, tiles_s, 0), 0) * KV_HEADS
    tiles = tl.maximum(tl.sum(tl.where(seqs == sequence, tiles_s, 0), 0), 1)
    within = (wanted - sequence_start) % tiles
    nearest = tl.where(2 * within < tiles, 0, tiles)
    moved = tl.where(tl.abs(nearest - within) <= snap, nearest - within, 0)
    cut = wanted + moved
    is_past = cut - sequence_start == tiles * KV_HEADS
    sequence += is_past.to(tl.int32)
    sequence_start = tl.where(is_past, cut, sequence_start)
    return tl.minimum(cut, work), sequence, sequence_start, (within + moved) % tiles


@triton.jit
def _tiles_of(contexts, starts, num_sequences, seqs, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """Tiles of each sequence `seqs` per kv head. A sequence without context has one, all masked, so that
    its output is written (zeros)."""
    present = seqs < num_sequences
    context = tl.load(contexts + seqs, mask=present, other=0)
    first = tl.zeros_like(context)
    if WINDOW > 0:
        count = tl.full(context.shape, 1, tl.int32)
        if QUERIES > 1:
            count = tl.load(starts + seqs + 1, mask=present, other=0) - tl.load(starts + seqs, mask=present, other=0)
        first = tl.maximum(context - count - WINDOW + 1, 0) // TILE
    tiles = tl.maximum(tl.cdiv(context, TILE) - first, 1)
    return tl.where(present, tiles, 0)


@triton.jit
def _combine(parts, stats, first_program, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A divided pair from `count` programs' partial results, `first_program`'s first → [ROWS, WIDTH]."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        valid = (index < count)[:, None]
        slot = 2 * (first_program + index) + (index == 0).to(tl.int32)
        at = slot[:, None] * ROWS + row[None, :]
        part_peak = tl.load(stats + 2 * at, mask=valid, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stats + 2 * at + 1, mask=valid, other=0.0, cache_modifier=".cg")
        part = tl.load(
            parts + at[:, :, None] * WIDTH + dim[None, None, :], mask=valid[:, :, None], other=0.0, cache_modifier=".cg"
        )
        highest = tl.maximum(peak, tl.max(part_peak, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        factor = tl.exp2(part_peak - base[None, :])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(part_total * factor, 0)
        mixed = mixed * shrink[:, None] + tl.sum(part * factor[:, :, None], 0)
        peak = highest
    return mixed / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def _store(result, out, out_stride, starts, sequence, kv_head, GROUP: tl.constexpr, QUERIES: tl.constexpr,
           V_DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Rows (token, head of the group) of one pair into out."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    start, count = _rows_of(starts, sequence, QUERIES)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    pointers = out + (start + token)[:, None].to(tl.int64) * out_stride + head[:, None] * V_DIM + dim[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=(token < count)[:, None] & (dim < V_DIM)[None, :])


@triton.jit
def _rows_of(starts, sequence, QUERIES: tl.constexpr):
    """First row and number of rows of a sequence."""
    if QUERIES == 1:
        start = sequence
        count = 1
    else:
        start = tl.load(starts + sequence)
        count = tl.load(starts + sequence + 1) - start
    return start, count


@triton.jit
def _pairs_of(contexts, starts, sequence, QUERIES: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """A sequence's context, first row and number of rows; and its pairs' first tile and number of tiles."""
    context = tl.load(contexts + sequence)
    row_start, num_rows = _rows_of(starts, sequence, QUERIES)
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(context - num_rows - WINDOW + 1, 0) // TILE
    return context, row_start, num_rows, first_tile, tl.maximum(tl.cdiv(context, TILE) - first_tile, 1)


@triton.jit
def _load_query(q, q_stride, row_start, num_rows, kv_head, GROUP: tl.constexpr, DIM: tl.constexpr,
                ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """[ROWS, WIDTH], rows (token, head of the group), zeros where there is none."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    return tl.load(
        q + (row_start + token)[:, None].to(tl.int64) * q_stride + head[:, None] * DIM + dim[None, :],
        mask=(token < num_rows)[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _finish(peak, total, mixed, out, parts, stats, out_stride, starts, sequence, kv_head, slot, is_whole,
            GROUP: tl.constexpr, QUERIES: tl.constexpr, V_DIM: tl.constexpr, ROWS: tl.constexpr,
            KEPT_ROWS: tl.constexpr, V_WIDTH: tl.constexpr):  # fmt: skip
    """What a program has of a pair: the result if that is all of it, else a partial result."""
    if is_whole:
        result = mixed / tl.where(total == 0, 1.0, total)[:, None]
        _store(result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, ROWS, V_WIDTH)
    else:
        row = tl.arange(0, ROWS)
        dim = tl.arange(0, V_WIDTH)
        at = slot * KEPT_ROWS + row
        kept = row < KEPT_ROWS
        tl.store(parts + at[:, None] * V_WIDTH + dim[None, :], mixed, mask=kept[:, None])
        tl.store(stats + 2 * at, peak, mask=kept)
        tl.store(stats + 2 * at + 1, total, mask=kept)


@triton.jit(do_not_specialize=["num_sequences", "least", "snap"])
def _decode_kernel(
    q, k_pool, v_pool, tables, contexts, starts, out, parts, stats, counters,
    q_stride, k_stride, v_stride, table_stride, out_stride, num_sequences, scale, least, snap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEPT_ROWS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    SEQUENCES: tl.constexpr, CHUNK: tl.constexpr, FLAT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [rows, KV_HEADS * GROUP * DIM] (row stride given), pools [blocks, KV_HEADS, BLOCK_SIZE, ·], tables
    [num_sequences, ·], contexts [num_sequences], starts [num_sequences + 1] (if QUERIES > 1) → out. Per program
    two partial results in parts [·, KEPT_ROWS, V_WIDTH] and stats [·, KEPT_ROWS, 2]; counters [pairs], all 0."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    seqs = tl.arange(0, SEQUENCES)
    tiles_s = _tiles_of(contexts, starts, num_sequences, seqs, QUERIES, WINDOW, TILE)
    ends_s = tl.cumsum(tiles_s, 0) * KV_HEADS
    work = tl.sum(tiles_s, 0) * KV_HEADS
    share = tl.maximum(tl.cdiv(work, tl.num_programs(0)), tl.minimum(tl.max(tiles_s, 0), least))
    first_unit, sequence, sequence_start, begun = _cut_of(
        program * share, work, tiles_s, ends_s, seqs, snap, KV_HEADS
    )  # fmt: skip
    end, last_sequence, last_sequence_start, left = _cut_of(
        (program + 1) * share, work, tiles_s, ends_s, seqs, snap, KV_HEADS
    )  # fmt: skip
    if first_unit >= end:
        return
    context, row_start, num_rows, first_tile, tiles = _pairs_of(contexts, starts, sequence, QUERIES, WINDOW, TILE)
    kv_head = (first_unit - sequence_start) // tiles
    first_sequence = sequence
    first_head = kv_head
    first_start = first_unit - begun
    first_end = first_start + tiles
    last_start = end - left

    row = tl.arange(0, ROWS)
    token = row // GROUP
    offset = tl.arange(0, TILE)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, V_WIDTH), tl.float32)
    if FLAT:
        tile = begun
        block = find_blocks(
            tables + sequence.to(tl.int64) * table_stride, (first_tile + tile) * TILE, context, BLOCK_SIZE, TILE
        )
        query = _load_query(q, q_stride, row_start, num_rows, kv_head, GROUP, DIM, ROWS, WIDTH)
        for unit in range(first_unit, end):
            position = (first_tile + tile) * TILE + offset
            valid = position < context
            keys = load_keys(
                k_pool + kv_head * (BLOCK_SIZE * DIM), block, position, valid, k_stride, BLOCK_SIZE, DIM, WIDTH, True
            )
            values = load_values(
                v_pool + kv_head * (BLOCK_SIZE * V_DIM), block, position, valid, v_stride, BLOCK_SIZE, V_DIM, V_WIDTH,
                True,
            )  # fmt: skip
            is_last = tile + 1 == tiles
            is_last_head = is_last & (kv_head == KV_HEADS - 1)
            next_sequence = tl.minimum(sequence + is_last_head.to(tl.int32), num_sequences - 1)
            next_tile = tl.where(is_last, 0, tile + 1)
            next_context, next_row_start, next_num_rows, next_first_tile, next_tiles = _pairs_of(
                contexts, starts, next_sequence, QUERIES, WINDOW, TILE
            )
            block = find_blocks(
                tables + next_sequence.to(tl.int64) * table_stride, (next_first_tile + next_tile) * TILE, next_context,
                BLOCK_SIZE, TILE,
            )  # fmt: skip
            if tile == 0:
                query = _load_query(q, q_stride, row_start, num_rows, kv_head, GROUP, DIM, ROWS, WIDTH)
            peak = tl.where(tile == 0, float("-inf"), peak)
            total = tl.where(tile == 0, 0.0, total)
            mixed = tl.where(tile == 0, 0.0, mixed)
            last_visible = context - num_rows + token  # a row's own position
            visible = valid[None, :] & (position[None, :] <= last_visible[:, None])
            if WINDOW > 0:
                visible &= position[None, :] > last_visible[:, None] - WINDOW
            peak, total, mixed = attend_tile(query, keys, values, visible, peak, total, mixed, scale, SOFTCAP, True)
            if is_last | (unit + 1 == end):
                begins = unit - tile >= first_unit
                _finish(
                    peak, total, mixed, out, parts, stats, out_stride, starts, sequence, kv_head,
                    2 * program + begins.to(tl.int32), begins & is_last,
                    GROUP, QUERIES, V_DIM, ROWS, KEPT_ROWS, V_WIDTH,
                )  # fmt: skip
            kv_head = tl.where(is_last_head, 0, kv_head + is_last.to(tl.int32))
            sequence = next_sequence
            tile = next_tile
            context = next_context
            row_start = next_row_start
            num_rows = next_num_rows
            first_tile = next_first_tile
            tiles = next_tiles
    else:
        unit = first_unit
        while unit < end:
            context, row_start, num_rows, first_tile, tiles = _pairs_of(
                contexts, starts, sequence, QUERIES, WINDOW, TILE
            )  # fmt: skip
            kv_head = (unit - sequence_start) // tiles
            pair_start = sequence_start + kv_head * tiles
            begin = unit - pair_start
            stop = tl.minimum(tiles, end - pair_start)
            table = tables + sequence.to(tl.int64) * table_stride
            block = find_blocks(table, (first_tile + begin) * TILE, context, BLOCK_SIZE, TILE)
            query = _load_query(q, q_stride, row_start, num_rows, kv_head, GROUP, DIM, ROWS, WIDTH)
            last_visible = context - num_rows + token  # a row's own position
            keys_of_head = k_pool + kv_head * (BLOCK_SIZE * DIM)
            values_of_head = v_pool + kv_head * (BLOCK_SIZE * V_DIM)
            peak = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            mixed = tl.zeros((ROWS, V_WIDTH), tl.float32)
            for tile in range(first_tile + begin, first_tile + stop):
                position = tile * TILE + offset
                valid = position < context
                keys = load_keys(keys_of_head, block, position, valid, k_stride, BLOCK_SIZE, DIM, WIDTH, True)
                values = load_values(values_of_head, block, position, valid, v_stride, BLOCK_SIZE, V_DIM, V_WIDTH, True)
                block = find_blocks(table, (tile + 1) * TILE, context, BLOCK_SIZE, TILE)
                visible = valid[None, :] & (position[None, :] <= last_visible[:, None])
                if WINDOW > 0:
                    visible &= position[None, :] > last_visible[:, None] - WINDOW
                peak, total, mixed = attend_tile(query, keys, values, visible, peak, total, mixed, scale, SOFTCAP, True)
            _finish(
                peak, total, mixed, out, parts, stats, out_stride, starts, sequence, kv_head,
                2 * program + (begin == 0).to(tl.int32), (begin == 0) & (stop == tiles),
                GROUP, QUERIES, V_DIM, ROWS, KEPT_ROWS, V_WIDTH,
            )  # fmt: skip
            unit = pair_start + stop
            if stop == tiles and kv_head == KV_HEADS - 1:
                sequence_start += tiles * KV_HEADS
                sequence += 1

    # Of its pairs, a share divides the first, the last, or none.
    is_first_divided = (begun > 0) | (end < first_end)
    is_last_divided = (left > 0) & (last_start > first_start)
    if is_first_divided | is_last_divided:
        tl.debug_barrier()  # every thread's partial results come before the counts
        for which in range(2):
            divided_sequence = first_sequence
            head = first_head
            start = first_start
            is_divided = is_first_divided
            if which == 1:
                divided_sequence = last_sequence
                start = last_start
                is_divided = is_last_divided
            if is_divided:
                _, _, _, _, tiles = _pairs_of(contexts, starts, divided_sequence, QUERIES, WINDOW, TILE)
                if which == 1:
                    head = (start - last_sequence_start) // tiles
                # The cuts within the pair are those too far from its ends to have moved there.
                first_program = (start + snap) // share
                count = (start + tiles - snap - 1) // share - first_program + 1
                counter = counters + divided_sequence * KV_HEADS + head
                if tl.atomic_add(counter, 1) == count - 1:
                    tl.store(counter, 0)
                    result = _combine(parts, stats, first_program, count, KEPT_ROWS, V_WIDTH, CHUNK)
                    _store(
                        result,
                        out,
                        out_stride,
                        starts,
                        divided_sequence,
                        head,
                        GROUP,
                        QUERIES,
                        V_DIM,
                        KEPT_ROWS,
                        V_WIDTH,
                    )


def decode_attention(
    q_rows: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    out: Tensor,
    *,
    plan: DecodePlan,
    counters: Tensor,
    max_context: int,
    query_start: Tensor | None = None,
    max_query: int = 1,
    pdl: bool = False,
) -> None:
    """Attention of each sequence's last tokens over its cached context, into `out`.

    q_rows [rows, >= q_width] (any row stride), block_tables [s, b] and context_lens [s] int32, out
    [rows, num_heads * v_head_dim] (any row stride). Row i belongs to sequence i, or with query_start
    [s + 1] (any origin; rows are counted from 0 of q_rows and out), up to max_query rows to each. A
    sequence with context 0 gets zeros, and its block table is not read. max_context, on the host, bounds
    the grid and nothing else. counters: int32 [>= s * num_kv_heads], zero before and after.
    """
    num_sequences = context_lens.shape[0]
    group = spec.num_heads // spec.num_kv_heads
    queries = triton.next_power_of_2(max_query)
    starts = context_lens if query_start is None else query_start
    most_tiles = num_sequences * spec.num_kv_heads * triton.cdiv(max_context, plan.tile)
    programs = max(1, min(plan.programs, most_tiles))
    kept_rows, v_width = triton.next_power_of_2(group * queries), padded_dim(spec.v_head_dim)
    parts = torch.empty(2 * programs, kept_rows, v_width, dtype=torch.float32, device=out.device)
    stats = torch.empty(2 * programs, kept_rows, 2, dtype=torch.float32, device=out.device)
    options: dict[str, int] = {"launch_pdl": True} if pdl else {}
    if plan.registers:
        options["maxnreg"] = plan.registers
    _decode_kernel[(programs,)](
        q_rows, cache.k, cache.v, block_tables, context_lens, starts, out, parts, stats, counters,
        q_rows.stride(0), cache.k.stride(0), cache.v.stride(0), block_tables.stride(0), out.stride(0),
        num_sequences, spec.scale, plan.least, plan.snap,
        KV_HEADS=spec.num_kv_heads, GROUP=group, QUERIES=queries, DIM=spec.head_dim, V_DIM=spec.v_head_dim,
        BLOCK_SIZE=cache.block_size, WINDOW=spec.window or 0, SOFTCAP=spec.softcap or 0.0, TILE=plan.tile,
        ROWS=max(16, kept_rows), KEPT_ROWS=kept_rows, WIDTH=padded_dim(spec.head_dim), V_WIDTH=v_width,
        SEQUENCES=padded_count(num_sequences), CHUNK=max(1, min(16, 8192 // (kept_rows * v_width))), FLAT=plan.flat,
        PDL=pdl, num_warps=plan.num_warps, num_stages=plan.num_stages, **options,
    )  # fmt: skip
