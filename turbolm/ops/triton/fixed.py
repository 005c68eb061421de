"""Products and attention of which a row has the same bits whatever is computed beside it: how work is divided depends
on a row's own position and on the shapes of weights, never on how many rows there are.

    t  rows    n, k  out and in features of a matrix

Attention goes over splits of SPLIT positions, each with a softmax of its own, which are merged in their order. A
program does so for all splits of its rows; where there are few rows, programs take one split each, and another kernel
merges them by the same sums. Positions that a row doesn't see change nothing, not even a bit: they are zeros in sums,
and factors of 1.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.triton.launch import await_inputs, pdl_options

_ROWS = 64  # the fewest that the tensor cores of this decade take at once
_DEPTH = 64
_FEW_COLUMNS, _MANY_COLUMNS = 32, 128  # of a program
_PROGRAMS = 128  # of so many a matrix has at least, so that a row alone keeps a GPU busy

_TILE = 64  # positions
SPLIT = 256
_PARTS_BYTES = 64 << 20  # that splits of few rows may take
_BUSY = 256  # programs with which a GPU has enough to do


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_kernel(
    x, w, scales, bias, out, x_stride, out_stride, num_rows, n, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x [t, k], w [n, k] → out [t, n]; a tile of [ROWS, COLUMNS] per program. w: numbers, int8 codes, or e4m3 as
    bytes; scales [n] (if SCALED), bias [n] (if BIASED)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    is_row, is_column = row < num_rows, column < n
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    w_rows = w + column.to(tl.int64)[None, :] * k
    await_inputs(PDL)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, k, DEPTH):
        at = first + inner
        a = tl.load(x_rows + at[None, :], mask=is_row[:, None] & (at < k)[None, :], other=0.0)
        b = tl.load(w_rows + at[:, None], mask=is_column[None, :] & (at < k)[:, None], other=0)
        if w.dtype.element_ty == tl.uint8:
            b = b.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(a.dtype)
        else:
            b = b.to(a.dtype)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    if SCALED:
        sums *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    if BIASED:
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def multiply(x_tk: Tensor, weight_nk: Tensor, scales_n: Tensor | None, bias_n: Tensor | None, out_tn: Tensor) -> None:
    """x @ (weight * scales).T + bias into `out_tn`, summed in float32 in the order of k. weight: contiguous, in the
    dtype of x, int8 or float8_e4m3fn; scales: float32."""
    num_rows, k = x_tk.shape
    n = weight_nk.shape[0]
    assert x_tk.stride(1) == 1 and out_tn.stride(1) == 1 and weight_nk.is_contiguous()
    if weight_nk.dtype == torch.float8_e4m3fn:
        weight_nk = weight_nk.view(torch.uint8)
    columns = _MANY_COLUMNS
    while columns > _FEW_COLUMNS and triton.cdiv(n, columns) < _PROGRAMS:
        columns //= 2
    _multiply_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(n, columns))](
        x_tk, weight_nk, out_tn if scales_n is None else scales_n, out_tn if bias_n is None else bias_n, out_tn,
        x_tk.stride(0), out_tn.stride(0), num_rows, n, k,
        ROWS=_ROWS, COLUMNS=columns, DEPTH=_DEPTH, SCALED=scales_n is not None, BIASED=bias_n is not None,
        num_warps=4, num_stages=4, **pdl_options(x_tk.device),
    )  # fmt: skip


@triton.jit
def _merge(peak, total, sums, next_peak, next_total, next_sums):
    """Of two splits' softmax states one. A state: the largest logit (in powers of two), and sums relative to it."""
    highest = tl.maximum(peak, next_peak)
    base = tl.where(highest == float("-inf"), 0.0, highest)  # -inf minus -inf would be NaN
    shrink, next_shrink = tl.exp2(peak - base), tl.exp2(next_peak - base)
    total = total * shrink + next_total * next_shrink
    sums = sums * shrink[:, None] + next_sums * next_shrink[:, None]
    return highest, total, sums


@triton.jit
def _attend_split(
    query, k_head, v_head, table, first, furthest, last_visible, context, factor, k_stride, v_stride,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT_SIZE: tl.constexpr,
):  # fmt: skip
    """The softmax state of rows over the positions `first` … of a split, as far as any sees them: before
    `furthest`. last_visible [ROWS]: their own positions."""
    dim, v_dim = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, V_WIDTH), tl.float32)
    for start in range(0, tl.minimum(furthest - first, SPLIT_SIZE), TILE):
        position = first + start + tl.arange(0, TILE)
        is_there = position < context
        block = tl.load(table + position // BLOCK_SIZE, mask=is_there, other=0).to(tl.int64)
        slot = position % BLOCK_SIZE
        keys = tl.load(
            k_head + (block * k_stride + slot * DIM)[None, :] + dim[:, None],
            mask=is_there[None, :] & (dim < DIM)[:, None],
            other=0.0,
        )
        values = tl.load(
            v_head + (block * v_stride + slot * V_DIM)[:, None] + v_dim[None, :],
            mask=is_there[:, None] & (v_dim < V_DIM)[None, :],
            other=0.0,
        )
        logits = tl.dot(query, keys, input_precision="ieee") * factor
        if SOFTCAP > 0:  # factor has 2 / SOFTCAP in it: tanh(x) = 1 - 2 / (exp(2x) + 1)
            logits = (1 - 2 / (tl.exp2(logits) + 1)) * (SOFTCAP * 1.4426950408889634)
        visible = is_there[None, :] & (position[None, :] <= last_visible[:, None])
        if WINDOW > 0:
            visible &= position[None, :] > last_visible[:, None] - WINDOW
        logits = tl.where(visible, logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        peak = highest
    return peak, total, sums


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "num_splits"])
def _attend_kernel(
    q, k_pool, v_pool, tables, contexts, starts, out, parts, stats,
    q_stride, k_stride, v_stride, table_stride, out_stride, num_sequences, num_splits, factor,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, SPLIT_SIZE: tl.constexpr, SEQUENCES: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, programs that the sequences need, splits if ALONE). ALONE: a program computes one split of one
    row of tokens, to parts [t, heads, splits, V_DIM] and stats [t, heads, splits, 2]; else all splits, to out."""
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    await_inputs(PDL)
    if ALONE:
        sequence = index
        index = 0
    else:
        seqs = tl.arange(0, SEQUENCES)
        present = seqs < num_sequences
        counts = tl.load(starts + seqs + 1, mask=present, other=0) - tl.load(starts + seqs, mask=present, other=0)
        needed = tl.cdiv(counts, TOKENS)
        sequence = tl.sum((tl.cumsum(needed, 0) <= index).to(tl.int32), 0)
        index -= tl.sum(tl.where(seqs < sequence, needed, 0), 0)
    start = tl.load(starts + sequence)
    num_rows = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    row = tl.arange(0, ROWS)
    token = index * TOKENS + row // GROUP
    wanted = (token < num_rows) & (row < TOKENS * GROUP)
    head = kv_head * GROUP + row % GROUP
    dim, v_dim = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    query = tl.load(
        q + (start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * DIM + dim[None, :],
        mask=wanted[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    nearest = context - num_rows + index * TOKENS  # position of the first row
    last_visible = context - num_rows + token
    table = tables + sequence.to(tl.int64) * table_stride
    k_head = k_pool + kv_head * (BLOCK_SIZE * DIM)
    v_head = v_pool + kv_head * (BLOCK_SIZE * V_DIM)
    place = (start + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    if ALONE:
        split = tl.program_id(2)
        first = split * SPLIT_SIZE
        is_seen = first < context
        if WINDOW > 0:
            is_seen &= first + SPLIT_SIZE > nearest - WINDOW + 1
        if is_seen:
            peak, total, sums = _attend_split(
                query, k_head, v_head, table, first, context, last_visible, context, factor, k_stride, v_stride, DIM,
                V_DIM, BLOCK_SIZE, WIDTH, V_WIDTH, WINDOW, SOFTCAP, ROWS, TILE, SPLIT_SIZE,
            )  # fmt: skip
            at = place * num_splits + split
            tl.store(stats + 2 * at, peak, mask=wanted)
            tl.store(stats + 2 * at + 1, total, mask=wanted)
            mask = wanted[:, None] & (v_dim < V_DIM)[None, :]
            tl.store(parts + at[:, None] * V_DIM + v_dim[None, :], sums, mask=mask)
    else:
        low = tl.zeros((), tl.int32)
        if WINDOW > 0:
            low = tl.maximum(nearest - WINDOW + 1, 0) // SPLIT_SIZE
        furthest = tl.minimum(nearest + TOKENS, context)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, V_WIDTH), tl.float32)
        for split in range(low, tl.cdiv(furthest, SPLIT_SIZE)):
            next_peak, next_total, next_sums = _attend_split(
                query, k_head, v_head, table, split * SPLIT_SIZE, furthest, last_visible, context, factor, k_stride,
                v_stride, DIM, V_DIM, BLOCK_SIZE, WIDTH, V_WIDTH, WINDOW, SOFTCAP, ROWS, TILE, SPLIT_SIZE,
            )  # fmt: skip
            peak, total, sums = _merge(peak, total, sums, next_peak, next_total, next_sums)
        result = sums / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(
            out + (start + token).to(tl.int64)[:, None] * out_stride + head[:, None] * V_DIM + v_dim[None, :],
            result.to(out.dtype.element_ty),
            mask=wanted[:, None] & (v_dim < V_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    parts, stats, contexts, out, out_stride, num_splits,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, WINDOW: tl.constexpr, SPLIT_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (decodes, heads): the splits of a head of the decode's only token, in their order, → out."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    await_inputs(PDL)
    context = tl.load(contexts + token)
    low = tl.zeros((), tl.int32)
    if WINDOW > 0:
        low = tl.maximum(context - WINDOW, 0) // SPLIT_SIZE
    dim = tl.arange(0, V_WIDTH)
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((1, V_WIDTH), tl.float32)
    one = tl.arange(0, 1)
    for split in range(low, tl.cdiv(context, SPLIT_SIZE)):
        at = (token * HEADS + head) * num_splits + split
        next_peak = tl.load(stats + 2 * at + one)
        next_total = tl.load(stats + 2 * at + 1 + one)
        next_sums = tl.load(parts + at * V_DIM + dim, mask=dim < V_DIM, other=0.0)[None, :]
        peak, total, sums = _merge(peak, total, sums, next_peak, next_total, next_sums)
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    place = out + token * out_stride + head * V_DIM + dim
    tl.store(place[None, :], result.to(out.dtype.element_ty), mask=(dim < V_DIM)[None, :])


def attend(
    qkv_tw: Tensor,
    query_start: Tensor,
    counts: list[int] | None,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context: int,
    cache: LayerCache,
    spec: AttentionSpec,
    out: Tensor,
    *,
    splits_apart: bool | None = None,
) -> None:
    """Causal attention of each sequence's newest rows over its cached context (which includes them), into `out`.

    qkv_tw [t, >= q_width] (q first); query_start [s + 1], context_lens [s], block_tables [s, b] int32; counts: rows of
    each sequence, None: one. Keys and values in the dtype of q. A sequence of context 0 gets zeros. splits_apart:
    whether splits have programs of their own, of single rows only; None: where that is faster. Both give the same bits.
    """
    assert cache.k.dtype == qkv_tw.dtype == cache.v.dtype
    num_sequences, group = context_lens.shape[0], spec.num_heads // spec.num_kv_heads
    num_splits, num_rows = triton.cdiv(max_context, SPLIT), max(_ROWS, triton.next_power_of_2(group))
    if splits_apart is None:
        parts_bytes = num_sequences * spec.num_heads * num_splits * (spec.v_head_dim + 2) * 4
        is_idle = num_sequences * spec.num_kv_heads < _BUSY
        splits_apart = counts is None and num_splits > 1 and is_idle and parts_bytes <= _PARTS_BYTES
    parts = stats = out
    if splits_apart:
        shape = (num_sequences, spec.num_heads, num_splits)
        parts = torch.empty(*shape, spec.v_head_dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=out.device)
    tokens = num_rows // group
    needed = num_sequences if counts is None else sum(triton.cdiv(count, tokens) for count in counts)
    log2_e = 1.4426950408889634
    factor = spec.scale * (2 * log2_e / spec.softcap if spec.softcap else log2_e)
    sizes = {
        "V_DIM": spec.v_head_dim, "V_WIDTH": max(16, triton.next_power_of_2(spec.v_head_dim)),
        "WINDOW": spec.window or 0, "SPLIT_SIZE": SPLIT, **pdl_options(out.device),
    }  # fmt: skip
    _attend_kernel[(spec.num_kv_heads, needed, num_splits if splits_apart else 1)](
        qkv_tw, cache.k, cache.v, block_tables, context_lens, query_start, out, parts, stats,
        qkv_tw.stride(0), cache.k.stride(0), cache.v.stride(0), block_tables.stride(0), out.stride(0),
        num_sequences, num_splits, factor, GROUP=group, KV_HEADS=spec.num_kv_heads, DIM=spec.head_dim,
        BLOCK_SIZE=cache.block_size, WIDTH=max(16, triton.next_power_of_2(spec.head_dim)), SOFTCAP=spec.softcap or 0.0,
        ROWS=num_rows, TILE=_TILE, SEQUENCES=max(16, triton.next_power_of_2(num_sequences)), ALONE=splits_apart,
        num_warps=4, num_stages=2, **sizes,
    )  # fmt: skip
    if splits_apart:
        _merge_kernel[(num_sequences, spec.num_heads)](
            parts, stats, context_lens, out, out.stride(0), num_splits, HEADS=spec.num_heads, num_warps=4, **sizes
        )  # fmt: skip
