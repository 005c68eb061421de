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

from turbolm.kv import KvShape
from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.triton.launch import await_inputs
from turbolm.ops.triton.tiles import (
    FP8,
    INT4,
    LOG2_E,
    NUMBERS,
    RAISE,
    UNITS,
    attend_tile,
    codes_of,
    dimension_of,
    find_blocks,
    finish,
    load_query,
    load_tile,
    minimum_of,
    padded_count,
    padded_dim,
    result_width,
    scale_of,
    shapes,
    stored,
    value_offsets,
)

SHORT_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the decode kernel runs. `plan_decode` is the rule; other plans are for measurements."""

    tile: int  # positions of K and V per step of a program
    programs: int  # shares that the work is cut into
    num_warps: int
    num_stages: int  # of the pipeline of loads
    reduce_apart: bool = False  # put divided pairs together in a kernel of its own
    registers: int | None = None  # of a thread, at most


def plan_decode(
    spec: AttentionSpec, cache: LayerCache, num_sms: int, shared_memory: int, num_sequences: int, max_context: int,
    max_query: int = 1,
) -> DecodePlan:  # fmt: skip
    """The rule: about as many programs as run at once on a GPU of num_sms multiprocessors with `shared_memory` bytes
    each, so that no share waits for another.

    Of numbers, tiles of 64 positions. Many short contexts are bound by the latency of their few loads: more programs
    with a shorter pipeline hide it (64 of 300: 27 µs instead of 34). Codes are bound by instructions, of which one
    warp needs the fewest: nothing passes between warps, and nothing is computed twice."""
    width = padded_dim(spec.head_dim) + padded_dim(spec.v_head_dim)
    rows = triton.next_power_of_2(spec.num_heads // spec.num_kv_heads * triton.next_power_of_2(max_query))
    num_bytes = KvShape(1, spec.head_dim, spec.v_head_dim).bytes_per_token(cache.kind_k, cache.kind_v)  # of a position
    registers = None
    if cache.k.itemsize == 1 or cache.v.itemsize == 1:
        # As measured, 64 sequences of 4096 and of 300: int8 144 µs and 18.6 (of 16 bits 259 and 27), int4 82 and 13.4.
        is_short = max_context <= SHORT_CONTEXT
        tile, num_warps, num_stages, most = (32, 1, 3, 9) if is_short else (64, 1, 4 if num_bytes > 160 else 3, 8)
        if rows > 16 or width > 256:
            tile, num_warps, num_stages, most = 32, 4, 2, 2
        used = tile * num_bytes + 4096
    else:
        tile = 64 if width <= 256 else 32
        is_short = max_context <= SHORT_CONTEXT and num_sequences >= 16 and width <= 256
        num_warps, num_stages, most, registers = (4, 2, 4, 128) if is_short else (4, 3, 3, 168)
        registers = registers if width <= 256 else None
        element_size = cache.k.itemsize
        used = (num_stages - 1) * tile * width * element_size + 16 * (width + tile) * element_size + 1024
    programs = num_sms * max(1, min(most, shared_memory // used))
    return DecodePlan(tile, programs, num_warps, num_stages, registers=registers)


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
def _key_offsets(TILE: tl.constexpr, V_KIND: tl.constexpr):
    """Positions of the rows of a tile of K, from the tile's first. With codes of V, which are pairs of positions, the
    first of each two come first."""
    offset = tl.arange(0, TILE)
    if V_KIND != NUMBERS:
        offset = offset % (TILE // 2) * 2 + offset // (TILE // 2)
    return offset


@triton.jit
def _hidden(position, context, last_visible, QUERIES: tl.constexpr, WINDOW: tl.constexpr):
    """0 where a row sees a position, else -inf: [TILE, 1], or [TILE, rows] where rows see different ones."""
    if QUERIES == 1:
        visible = (position < context)[:, None]
        if WINDOW > 0:
            visible &= (position >= context - WINDOW)[:, None]
    else:
        visible = (position < context)[:, None] & (position[:, None] <= last_visible[None, :])
        if WINDOW > 0:
            visible &= position[:, None] > last_visible[None, :] - WINDOW
    return tl.where(visible, 0.0, float("-inf"))


@triton.jit
def _attend_codes(
    query, query_sum, keys, key_scales, values, value_scales, hidden, peak, total, low, high, rest, scale,
    SOFTCAP: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
):  # fmt: skip
    """As `tiles.attend_tile`, but for logits with positions down and rows of q across: those are many and fill an
    instruction's 16, these are few and fit its 8. For one warp, which has all of a row. hidden: -inf, or 0 for what
    is seen, [TILE, 1 or rows]."""
    factor = scale * (2 * LOG2_E / SOFTCAP if SOFTCAP > 0 else LOG2_E)
    if K_KIND == NUMBERS:
        logits = tl.dot(keys, tl.trans(query[0]), input_precision="ieee") * factor
    else:
        logits = tl.dot(codes_of(keys, 0, K_KIND), tl.trans(query[0]))
        logits = tl.dot(codes_of(keys, 1, K_KIND), tl.trans(query[1]), logits)
        if K_KIND == INT4:
            logits = tl.dot(codes_of(keys, 2, K_KIND), tl.trans(query[2]), logits)
            logits = tl.dot(codes_of(keys, 3, K_KIND), tl.trans(query[3]), logits)
        if K_KIND == FP8:
            logits = logits * factor
        else:
            shift = (minimum_of(key_scales) * factor)[:, None] * query_sum[None, :]
            logits = logits * (scale_of(key_scales) * (factor * UNITS))[:, None] + shift
    if SOFTCAP > 0:
        logits = (1 - 2 / (tl.exp2(logits) + 1)) * (SOFTCAP * LOG2_E)
    logits += hidden
    highest = tl.maximum(peak, tl.max(logits, 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(logits - base[None, :])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 0)
    low = low * shrink[:, None]
    if V_KIND == NUMBERS:
        low = tl.dot(tl.trans(weights.to(values.dtype)), values, low, input_precision="ieee")
    else:
        if V_KIND != FP8:
            rest = rest * shrink + tl.sum(weights * minimum_of(value_scales)[:, None], 0)
            weights = weights * (scale_of(value_scales) * RAISE)[:, None]
        halves = tl.reshape(weights.to(tl.float16), (2, weights.shape[0] // 2, weights.shape[1]))
        first, second = tl.split(tl.permute(halves, (2, 1, 0)))
        low = tl.dot(first, codes_of(values, 0, V_KIND), low)
        if V_KIND == INT4:
            high = tl.dot(first, codes_of(values, 1, V_KIND), high * shrink[:, None])
            low = tl.dot(second, codes_of(values, 2, V_KIND), low)
            high = tl.dot(second, codes_of(values, 3, V_KIND), high)
        else:
            low = tl.dot(second, codes_of(values, 1, V_KIND), low)
    return highest, total, low, high, rest


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
           V_DIM: tl.constexpr, V_KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Rows (token, head of the group) of one pair into out."""
    row = tl.arange(0, ROWS)
    dim = dimension_of(tl.arange(0, WIDTH), V_DIM, V_KIND)
    start, count = _rows_of(starts, sequence, QUERIES)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    pointers = out + (start + token)[:, None].to(tl.int64) * out_stride + head[:, None] * V_DIM + dim[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=(token < count)[:, None] & (dim >= 0)[None, :])


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


@triton.jit(
    do_not_specialize=["num_sequences", "table_stride"],
    do_not_specialize_on_alignment=["tables", "contexts", "starts"],
)
def _decode_kernel(
    q, k_pool, v_pool, k_scales, v_scales, tables, contexts, starts, out, parts, stats, counters,
    q_stride, k_stride, v_stride, table_stride, out_stride, num_sequences, scale,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, KEPT_ROWS: tl.constexpr,
    OUT_WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, CHUNK: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, K_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, V_COLUMNS: tl.constexpr, V_WIDTH: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """q [rows, KV_HEADS * GROUP * DIM] (row stride given), pools [blocks, KV_HEADS, BLOCK_SIZE, ·], tables
    [num_sequences, ·], contexts [num_sequences], starts [num_sequences + 1] (if QUERIES > 1) → out. Per program
    two partial results in parts [·, KEPT_ROWS, OUT_WIDTH] and stats [·, KEPT_ROWS, 2]; counters [pairs], all 0."""
    await_inputs(PDL)
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
    offset = _key_offsets(TILE, V_KIND)
    value_offset = value_offsets(TILE, V_KIND)
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
        pointers = q + (row_start + token).to(tl.int64) * q_stride + head * DIM
        query, query_sum, largest = load_query(pointers, token < num_rows, DIM, K_COLUMNS, WIDTH, K_KIND)
        last_visible = context - num_rows + token  # a row's own position
        table = tables + sequence.to(tl.int64) * table_stride
        keys_of_head = k_pool + kv_head * (BLOCK_SIZE * K_COLUMNS)
        values_of_head = v_pool + kv_head * ((BLOCK_SIZE if V_KIND == 0 else BLOCK_SIZE // 2) * V_COLUMNS)
        key_scales_of_head = k_scales + kv_head * BLOCK_SIZE
        value_scales_of_head = v_scales + kv_head * BLOCK_SIZE
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        low = tl.zeros((ROWS, V_WIDTH), tl.float32)
        high = tl.zeros((ROWS, V_WIDTH), tl.float32)
        rest = tl.zeros((ROWS,), tl.float32)
        first = (first_tile + begin) * TILE
        block = find_blocks(table, first, offset, context, BLOCK_SIZE, TILE)
        value_block = find_blocks(table, first, value_offset, context, BLOCK_SIZE, TILE)
        for tile in range(first_tile + begin, first_tile + stop):
            first = tile * TILE
            keys, key_scales, values, value_scales = load_tile(
                keys_of_head, values_of_head, key_scales_of_head, value_scales_of_head, block, value_block,
                first + offset, first + value_offset, context, k_stride, v_stride, KV_HEADS, BLOCK_SIZE, K_COLUMNS,
                WIDTH, V_COLUMNS, V_WIDTH, True, K_KIND, V_KIND,
            )  # fmt: skip
            block = find_blocks(table, first + TILE, offset, context, BLOCK_SIZE, TILE)
            value_block = find_blocks(table, first + TILE, value_offset, context, BLOCK_SIZE, TILE)
            position = first + offset
            visible = (position < context)[None, :] & (position[None, :] <= last_visible[:, None])
            if WINDOW > 0:
                visible &= position[None, :] > last_visible[:, None] - WINDOW
            if K_KIND == NUMBERS and V_KIND == NUMBERS:
                peak, total, low, high, rest = attend_tile(
                    query, query_sum, keys, key_scales, values, value_scales, visible, peak, total, low, high, rest,
                    scale, SOFTCAP, True, K_KIND, V_KIND,
                )  # fmt: skip
            else:
                hidden = _hidden(position, context, last_visible, QUERIES, WINDOW)
                peak, total, low, high, rest = _attend_codes(
                    query, query_sum, keys, key_scales, values, value_scales, hidden, peak, total, low, high, rest,
                    scale * largest, SOFTCAP, K_KIND, V_KIND,
                )  # fmt: skip
        mixed = finish(low, high, rest, V_KIND)

        if begin == 0 and stop == tiles:
            result = mixed / tl.where(total == 0, 1.0, total)[:, None]
            _store(result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, V_KIND, ROWS, OUT_WIDTH)
        else:
            at = (2 * program + (begin == 0).to(tl.int32)) * KEPT_ROWS + row
            kept = row < KEPT_ROWS
            wide = tl.arange(0, OUT_WIDTH)
            tl.store(parts + at[:, None] * OUT_WIDTH + wide[None, :], mixed, mask=kept[:, None])
            tl.store(stats + 2 * at, peak, mask=kept)
            tl.store(stats + 2 * at + 1, total, mask=kept)
            if not APART:
                first_program = pair_start // share
                count = (pair_start + tiles - 1) // share - first_program + 1
                tl.debug_barrier()  # every thread's stores come before the count
                if tl.atomic_add(counters + sequence * KV_HEADS + kv_head, 1) == count - 1:
                    tl.store(counters + sequence * KV_HEADS + kv_head, 0)
                    result = _combine(parts, stats, first_program, count, KEPT_ROWS, OUT_WIDTH, CHUNK)
                    _store(
                        result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, V_KIND, KEPT_ROWS,
                        OUT_WIDTH,
                    )  # fmt: skip
        unit = pair_start + stop
        if stop == tiles and kv_head == KV_HEADS - 1:
            sequence_start += tiles * KV_HEADS
            sequence += 1


@triton.jit(do_not_specialize=["num_sequences", "num_programs"])
def _combine_kernel(
    contexts, starts, out, parts, stats, out_stride, num_sequences, num_programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, V_DIM: tl.constexpr, V_KIND: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, KEPT_ROWS: tl.constexpr, OUT_WIDTH: tl.constexpr,
    SEQUENCES: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, kv head): puts it together if the decode kernel's shares divided it."""
    await_inputs(PDL)
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
        result = _combine(parts, stats, first_program, count, KEPT_ROWS, OUT_WIDTH, CHUNK)
        _store(result, out, out_stride, starts, sequence, kv_head, GROUP, QUERIES, V_DIM, V_KIND, KEPT_ROWS, OUT_WIDTH)


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
    kept_rows, width = triton.next_power_of_2(group * queries), result_width(cache, spec)
    (k, k_scales), (v, v_scales) = stored(cache.k, cache.k_scales), stored(cache.v, cache.v_scales)
    is_coded = cache.k.itemsize == 1 or cache.v.itemsize == 1
    parts = torch.empty(2 * programs, kept_rows, width, dtype=torch.float32, device=out.device)
    stats = torch.empty(2 * programs, kept_rows, 2, dtype=torch.float32, device=out.device)
    shape = shapes(cache, spec)
    work = {
        "GROUP": group, "QUERIES": queries, "TILE": plan.tile, "KEPT_ROWS": kept_rows, "OUT_WIDTH": width,
        "SEQUENCES": padded_count(num_sequences), "PDL": pdl,
        "CHUNK": max(1, min(16, 1024 * plan.num_warps // (kept_rows * width))),
    }  # fmt: skip
    launch = {"launch_pdl": True} if pdl else {}
    _decode_kernel[(programs,)](
        q_rows, k, v, k_scales, v_scales, block_tables, context_lens, starts, out, parts, stats, counters,
        q_rows.stride(0), k.stride(0), v.stride(0), block_tables.stride(0), out.stride(0), num_sequences, spec.scale,
        ROWS=max(8 if is_coded else 16, kept_rows), APART=plan.reduce_apart, num_warps=plan.num_warps,
        num_stages=plan.num_stages, maxnreg=plan.registers, **work, **shape, **launch,
    )  # fmt: skip
    if plan.reduce_apart:
        _combine_kernel[(spec.num_kv_heads, num_sequences)](
            context_lens, starts, out, parts, stats, out.stride(0), num_sequences, programs,
            num_warps=4, **work, **{name: shape[name] for name in ("KV_HEADS", "V_DIM", "V_KIND", "WINDOW")}, **launch,
        )  # fmt: skip
