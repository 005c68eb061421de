"""Paged attention of few new tokens per sequence over long contexts: decoding, and checking drafts.

Memory-bound: every byte of K and V is read once, by the program that serves all query heads of a kv head.
The work of a step, all tiles of all (sequence, kv head) pairs laid end to end, is cut into equal shares,
one per program (stream-K: Osama et al., 2023), so that long and short contexts balance and the grid
depends on no length. A pair that a cut divides is put together by the program that finishes last, in the
order of the context: results are deterministic.
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

SHORT_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the decode kernel runs. The defaults of `plan_decode` are the rule; others are for measurements."""

    tile: int  # positions of K and V per step of a program
    programs: int  # shares that the work is cut into
    num_warps: int
    num_stages: int  # of the pipeline of loads
    reduce_apart: bool = False  # put divided pairs together in a kernel of its own
    registers: int | None = None  # of a thread, at most


def plan_decode(
    spec: AttentionSpec, element_size: int, num_sms: int, shared_memory: int, num_sequences: int, max_context: int
) -> DecodePlan:
    """The rule: tiles of 64 positions, and as many programs as run at once on a GPU of num_sms multiprocessors
    with `shared_memory` bytes each, so that no share waits for another. Many short contexts are bound by the
    latency of their few loads: more programs with a shorter pipeline hide it (64 of 300: 27 µs instead of 34)."""
    width = padded_dim(spec.head_dim) + padded_dim(spec.v_head_dim)
    tile = 64 if width <= 256 else 32
    is_short = max_context <= SHORT_CONTEXT and num_sequences >= 16 and width <= 256
    num_warps, num_stages, most, registers = (4, 2, 4, 128) if is_short else (4, 3, 3, None)
    used = (num_stages - 1) * tile * width * element_size + 16 * (width + tile) * element_size + 1024
    return DecodePlan(
        tile, num_sms * max(1, min(most, shared_memory // used)), num_warps, num_stages, registers=registers
    )


@triton.jit
def _share_of_work(contexts, starts, num_sequences, seqs, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
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


@triton.jit(do_not_specialize=["num_sequences"])
def _decode_kernel(
    q, k_pool, v_pool, tables, contexts, starts, out, parts, stats, counters,
    q_stride, k_stride, v_stride, table_stride, out_stride, num_sequences, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEPT_ROWS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    SEQUENCES: tl.constexpr, CHUNK: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [rows, KV_HEADS * GROUP * DIM] (row stride given), pools [blocks, KV_HEADS, BLOCK_SIZE, ·], tables
    [num_sequences, ·], contexts [num_sequences], starts [num_sequences + 1] (if QUERIES > 1) → out. Per program
    two partial results in parts [·, KEPT_ROWS, V_WIDTH] and stats [·, KEPT_ROWS, 2]; counters [pairs], all 0."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    seqs = tl.arange(0, SEQUENCES)
    tiles_s = _share_of_work(contexts, starts, num_sequences, seqs, QUERIES, WINDOW, TILE)
    ends_s = tl.cumsum(tiles_s, 0) * KV_HEADS
    work = tl.sum(tiles_s, 0) * KV_HEADS
    share = tl.cdiv(work, tl.num_programs(0))
    unit = program * share
    end = tl.minimum(unit + share, work)
    sequence = tl.sum((ends_s <= unit).to(tl.int32), 0)  # the one that the first unit is of
    sequence_start = tl.sum(tl.where(seqs < sequence, tiles_s, 0), 0) * KV_HEADS

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    offset = tl.arange(0, TILE)
    while unit < end:
        context = tl.load(contexts + sequence)
        row_start, num_rows = _rows_of(starts, sequence, QUERIES)
        first_tile = 0
        if WINDOW > 0:
            first_tile = tl.maximum(context - num_rows - WINDOW + 1, 0) // TILE
        tiles = tl.maximum(tl.cdiv(context, TILE) - first_tile, 1)
        kv_head = (unit - sequence_start) // tiles
        pair_start = sequence_start + kv_head * tiles
        begin = unit - pair_start
        stop = tl.minimum(tiles, end - pair_start)

        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        query = tl.load(
            q + (row_start + token)[:, None].to(tl.int64) * q_stride + head[:, None] * DIM + dim[None, :],
            mask=(token < num_rows)[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        last_visible = context - num_rows + token  # a row's own position
        table = tables + sequence.to(tl.int64) * table_stride
        keys_of_head = k_pool + kv_head * (BLOCK_SIZE * DIM)
        values_of_head = v_pool + kv_head * (BLOCK_SIZE * V_DIM)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, V_WIDTH), tl.float32)
        block = find_blocks(table, (first_tile + begin) * TILE, context, BLOCK_SIZE, TILE)
        for tile in range(first_tile + begin, first_tile + stop):
            position = tile * TILE + offset
            valid = position < context
            keys = load_keys(keys_of_head, block, position, valid, k_stride, BLOCK_SIZE, DIM, WIDTH, True)
            values = load_values(values_of_head, block, position, valid, v_stride, BLOCK_SIZE, V_DIM, V_WIDTH, True)
            block = find_blocks(table, (tile + 1) * TILE, context, BLOCK_SIZE, TILE)
            visible = valid[None, :] & (position[None, :] <= last_visible[:, None])
            if WINDOW > 0:
                visible &= position[None, :] > last_visible[:, None] - WINDOW
            peak, total, mixed = attend_tile(
                query, keys, values, visible, peak, total, mixed, scale, SOFTCAP, True
            )  # fmt: skip

        if begin == 0 and stop == tiles:
            result = mixed / tl.where(total == 0, 1.0, total)[:, None]
            _store(result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, ROWS, V_WIDTH)
        else:
            at = (2 * program + (begin == 0).to(tl.int32)) * KEPT_ROWS + row
            kept = row < KEPT_ROWS
            wide = tl.arange(0, V_WIDTH)
            tl.store(parts + at[:, None] * V_WIDTH + wide[None, :], mixed, mask=kept[:, None])
            tl.store(stats + 2 * at, peak, mask=kept)
            tl.store(stats + 2 * at + 1, total, mask=kept)
            if not APART:
                first_program = pair_start // share
                count = (pair_start + tiles - 1) // share - first_program + 1
                tl.debug_barrier()  # every thread's stores come before the count
                if tl.atomic_add(counters + sequence * KV_HEADS + kv_head, 1) == count - 1:
                    tl.store(counters + sequence * KV_HEADS + kv_head, 0)
                    result = _combine(parts, stats, first_program, count, KEPT_ROWS, V_WIDTH, CHUNK)
                    _store(
                        result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, KEPT_ROWS, V_WIDTH
                    )  # fmt: skip
        unit = pair_start + stop
        if stop == tiles and kv_head == KV_HEADS - 1:
            sequence_start += tiles * KV_HEADS
            sequence += 1


@triton.jit(do_not_specialize=["num_sequences", "num_programs"])
def _combine_kernel(
    contexts, starts, out, parts, stats, out_stride, num_sequences, num_programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, V_DIM: tl.constexpr, WINDOW: tl.constexpr,
    TILE: tl.constexpr, KEPT_ROWS: tl.constexpr, V_WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, kv head): puts it together if the decode kernel's shares divided it."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    seqs = tl.arange(0, SEQUENCES)
    tiles_s = _share_of_work(contexts, starts, num_sequences, seqs, QUERIES, WINDOW, TILE)
    share = tl.cdiv(tl.sum(tiles_s, 0) * KV_HEADS, num_programs)
    tiles = tl.sum(tl.where(seqs == sequence, tiles_s, 0), 0)
    pair_start = tl.sum(tl.where(seqs < sequence, tiles_s, 0), 0) * KV_HEADS + kv_head * tiles
    first_program = pair_start // share
    count = (pair_start + tiles - 1) // share - first_program + 1
    if count > 1:
        result = _combine(parts, stats, first_program, count, KEPT_ROWS, V_WIDTH, CHUNK)
        _store(result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, KEPT_ROWS, V_WIDTH)


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
    shape = {
        "KV_HEADS": spec.num_kv_heads, "GROUP": group, "QUERIES": queries, "V_DIM": spec.v_head_dim,
        "WINDOW": spec.window or 0, "TILE": plan.tile, "KEPT_ROWS": kept_rows, "V_WIDTH": v_width,
        "SEQUENCES": padded_count(num_sequences), "CHUNK": max(1, min(16, 4096 // (kept_rows * v_width))), "PDL": pdl,
    }  # fmt: skip
    launch = {"launch_pdl": True} if pdl else {}
    _decode_kernel[(programs,)](
        q_rows, cache.k, cache.v, block_tables, context_lens, starts, out, parts, stats, counters,
        q_rows.stride(0), cache.k.stride(0), cache.v.stride(0), block_tables.stride(0), out.stride(0),
        num_sequences, spec.scale, DIM=spec.head_dim, BLOCK_SIZE=cache.block_size, SOFTCAP=spec.softcap or 0.0,
        ROWS=max(16, kept_rows), WIDTH=padded_dim(spec.head_dim), APART=plan.reduce_apart,
        num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.registers, **shape, **launch,
    )  # fmt: skip
    if plan.reduce_apart:
        _combine_kernel[(spec.num_kv_heads, num_sequences)](
            context_lens, starts, out, parts, stats, out.stride(0), num_sequences, programs,
            num_warps=4, **shape, **launch,
        )  # fmt: skip
