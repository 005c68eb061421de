"""What LoRA adapters add to a product: rows are shrunk to the adapter's rank, and expanded again.

    t  tokens    k, n  in and out features of the matrix    p  parts of it, with additions of their own
    r  largest rank, a multiple of 16    s  splits of k

A program takes a tile of rows and goes through the adapters that occur in it, each once: so rows of one adapter share
the reads of its weights wherever they lie side by side, and nothing has to be sorted. Which row has which adapter is
read from the device, as CUDA graphs need it. A row's bits don't depend on the other rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops import AdapterWeights
from turbolm.ops.triton.launch import await_inputs, layout_of_parts, load_sum, pdl_options

_CHUNK = 1024  # columns of one split
_BLOCK_K = 64
_BLOCK_N = 64
_FEW_ROWS = 128


@triton.jit
def _shrink_kernel(
    x, a, ranks, places, out, num_tokens, width, x_stride,
    NUM_PARTS: tl.constexpr, MAX_RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [t, k], a [places, p * r, k], ranks [places], places [t] → out float32 [s, t, p * r], 0 for rows without an
    adapter. Program: a tile of rows, a part, a split."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part, split = tl.program_id(1), tl.program_id(2)
    inside = row < num_tokens
    rank = tl.arange(0, BLOCK_R)
    await_inputs(PDL)
    place = tl.load(places + row, mask=inside, other=-1)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    current = tl.max(place, 0)
    while current >= 0:
        own = place == current
        if tl.load(ranks + current) > 0:
            base = a + (current * NUM_PARTS + part).to(tl.int64) * MAX_RANK * width
            found = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for first in range(split * CHUNK, tl.minimum(width, (split + 1) * CHUNK), BLOCK_K):
                column = first + tl.arange(0, BLOCK_K)
                values = tl.load(
                    x + row.to(tl.int64)[:, None] * x_stride + column[None, :],
                    mask=own[:, None] & (column < width)[None, :],
                    other=0.0,
                )
                factors = tl.load(
                    base + rank[None, :] * width + column[:, None],
                    mask=(rank < MAX_RANK)[None, :] & (column < width)[:, None],
                    other=0.0,
                )
                found = tl.dot(values, factors, found, input_precision="ieee")
            total = tl.where(own[:, None], found, total)
        current = tl.max(tl.where(place < current, place, -1), 0)
    offset = (split * num_tokens + row).to(tl.int64) * (NUM_PARTS * MAX_RANK) + part * MAX_RANK
    tl.store(out + offset[:, None] + rank[None, :], total, mask=inside[:, None] & (rank < MAX_RANK)[None, :])


@triton.jit
def _expand_kernel(
    shrunk, b, ranks, places, parts, out, num_tokens, width, part_stride, row_stride, out_stride,
    END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr, NUM_PARTS: tl.constexpr, MAX_RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """shrunk [NUM_SPLITS, t, p * r], b [places, r, n], parts [NUM_SUMS, t, n] → out [t, n]: the sum of `parts`, and of
    what the row's adapter adds. Program: a tile of rows, BLOCK_N columns."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    inside = row < num_tokens
    whole = inside[:, None] & (column < width)[None, :]
    rank = tl.arange(0, BLOCK_R)
    await_inputs(PDL)
    place = tl.load(places + row, mask=inside, other=-1)
    wide_row = row.to(tl.int64)
    total = load_sum(parts + wide_row[:, None] * row_stride + column[None, :], whole, part_stride, NUM_SUMS)
    current = tl.max(place, 0)
    while current >= 0:
        own = place == current
        if tl.load(ranks + current) > 0:
            for part in tl.static_range(NUM_PARTS):
                first = 0 if part == 0 else (END0 if part == 1 else END1)
                last = END0 if part == 0 else (END1 if part == 1 else END2)
                if (start < last) & (start + BLOCK_N > first):
                    offset = wide_row * (NUM_PARTS * MAX_RANK) + part * MAX_RANK
                    values = load_sum(
                        shrunk + offset[:, None] + rank[None, :],
                        own[:, None] & (rank < MAX_RANK)[None, :],
                        num_tokens * (NUM_PARTS * MAX_RANK),
                        NUM_SPLITS,
                    )
                    factors = tl.load(
                        b + (current.to(tl.int64) * MAX_RANK + rank)[:, None] * width + column[None, :],
                        mask=(rank < MAX_RANK)[:, None] & ((column >= first) & (column < last))[None, :],
                        other=0.0,
                    )
                    found = tl.dot(values.to(factors.dtype), factors, input_precision="ieee")
                    total = tl.where(own[:, None], total + found, total)
        current = tl.max(tl.where(place < current, place, -1), 0)
    tl.store(out + wide_row[:, None] * out_stride + column[None, :], total.to(out.dtype.element_ty), mask=whole)


def add_adapters(y_parts: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor, out_tn: Tensor) -> None:
    """out = y + what each row's adapter adds; y may be partial sums [p, t, n], and out may be y.
    places_t: int32, -1: no adapter."""
    num_sums, num_tokens, part_stride, row_stride = layout_of_parts(y_parts)
    num_parts, rank, width = len(adapters.ends), adapters.max_rank, x_tk.shape[1]
    num_splits = triton.cdiv(width, _CHUNK)
    tile = 16 if num_tokens <= _FEW_ROWS else 64
    num_tiles, block_r = triton.cdiv(num_tokens, tile), triton.next_power_of_2(rank)
    shrunk = torch.empty(num_splits, num_tokens, num_parts * rank, dtype=torch.float32, device=x_tk.device)
    options = pdl_options(out_tn.device)
    _shrink_kernel[(num_tiles, num_parts, num_splits)](
        x_tk, adapters.a, adapters.ranks, places_t, shrunk, num_tokens, width, x_tk.stride(0),
        NUM_PARTS=num_parts, MAX_RANK=rank, BLOCK_T=tile, BLOCK_R=block_r, BLOCK_K=_BLOCK_K, CHUNK=_CHUNK, **options,
    )  # fmt: skip
    ends = (*adapters.ends, 0, 0)[:3]
    _expand_kernel[(num_tiles, triton.cdiv(out_tn.shape[1], _BLOCK_N))](
        shrunk, adapters.b, adapters.ranks, places_t, y_parts, out_tn, num_tokens, out_tn.shape[1], part_stride,
        row_stride, out_tn.stride(0), END0=ends[0], END1=ends[1], END2=ends[2], NUM_PARTS=num_parts, MAX_RANK=rank,
        NUM_SPLITS=num_splits, NUM_SUMS=num_sums, BLOCK_T=tile, BLOCK_R=block_r, BLOCK_N=_BLOCK_N, **options,
    )  # fmt: skip
