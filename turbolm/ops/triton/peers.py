"""Kernels that read and write the memory of other GPUs: sums over ranks, and rows of a divided table.

    p  parts    t  tokens    h  hidden size    s  ranks

A sum takes one kernel. The program of a row adds up this rank's parts, writes the row into every other rank's
inbox, says so there, waits until all others have done the same, and adds up what they wrote: in the order of
ranks, so that all of them get the same bits. What follows a sum in the model is done at once: residual and norm.

An inbox has two places per rank and row, used in turn. A row's place is used again two sums later, when the
sum between has shown that everybody is done with it. Rows are counted one by one, so that steps of any sizes may
follow each other, and graphs of them be replayed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.launch import await_inputs, layout_of_parts, load_sum, pdl_options

# Polls of about a microsecond until a rank counts as lost: a minute. The kernel then ends with an error, which ends
# the process's use of the GPU; whoever watches the ranks' processes has said by then which one it was.
MAX_POLLS = 1 << 26


class PeerMemory(Protocol):
    """An allocation of one size on every rank."""

    @property
    def local(self) -> Tensor:
        """uint8, zeros at first."""

    @property
    def addresses(self) -> Tensor:
        """int64 [s]: where each rank's begins."""


@dataclass(frozen=True, slots=True)
class Inbox:
    """Where other ranks write their rows."""

    memory: PeerMemory
    counts: Tensor  # int64 [max_rows]: sums so far
    rank: int
    size: int
    max_rows: int
    width: int
    dtype: torch.dtype

    @staticmethod
    def num_bytes(size: int, max_rows: int, width: int, dtype: torch.dtype) -> int:
        """Two places per rank and row, then a count (int64) per rank and row."""
        return size * max_rows * (2 * width * dtype.itemsize + 8)


@triton.jit
def say(addresses, offset, row, count, RANK: tl.constexpr, SIZE: tl.constexpr, MAX_ROWS: tl.constexpr):
    """Tells every other rank that this one has written what belongs to `count` of a row. Counts (int64 [SIZE,
    MAX_ROWS]) lie `offset` bytes behind the addresses."""
    tl.debug_barrier()  # what all threads wrote goes before what one of them says
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            counts = (tl.load(addresses + peer) + offset).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(counts + RANK * MAX_ROWS + row, count, sem="release", scope="sys")


@triton.jit
def hear(
    addresses, offset, row, count, RANK: tl.constexpr, SIZE: tl.constexpr, MAX_ROWS: tl.constexpr,
    MAX_POLLS: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Waits until every other rank has said so."""
    counts = (tl.load(addresses + RANK) + offset).to(tl.pointer_type(tl.int64)) + row
    polls = 0
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            seen = tl.atomic_add(counts + peer * MAX_ROWS, 0, sem="acquire", scope="sys")
            while (seen < count) & (polls < MAX_POLLS):
                seen = tl.atomic_add(counts + peer * MAX_ROWS, 0, sem="acquire", scope="sys")
                polls += 1
    if ON_GPU:  # noqa: SIM102
        if polls >= MAX_POLLS:
            tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [polls], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _reduce_norm_kernel(
    parts, residual, weight, out, addresses, counts, eps, part_stride, row_stride, residual_stride, out_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr, COUNTS: tl.constexpr, MAX_POLLS: tl.constexpr, ON_GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [NUM_PARTS, t, WIDTH] of every rank, residual [t, WIDTH], weight [WIDTH] → out: a row per program.
    COUNTS: where they are in an inbox, in bytes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    await_inputs(PDL)
    count = tl.load(counts + row) + 1
    place = ((count % 2) * SIZE * MAX_ROWS + row) * WIDTH
    own = load_sum(parts + row * row_stride + column, inside, part_stride, NUM_PARTS).to(out.dtype.element_ty)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            inbox = tl.multiple_of(tl.load(addresses + peer).to(tl.pointer_type(out.dtype.element_ty)), 16)
            tl.store(inbox + place + RANK * MAX_ROWS * WIDTH + column, own, mask=inside)
    say(addresses, COUNTS, row, count, RANK, SIZE, MAX_ROWS)
    tl.store(counts + row, count)
    before_place = residual + row * residual_stride + column
    before = tl.load(before_place, mask=inside, other=0.0).to(tl.float32)
    hear(addresses, COUNTS, row, count, RANK, SIZE, MAX_ROWS, MAX_POLLS, ON_GPU)
    inbox = tl.multiple_of(tl.load(addresses + RANK).to(tl.pointer_type(out.dtype.element_ty)), 16)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += own.to(tl.float32)
        else:
            theirs = inbox + place + peer * MAX_ROWS * WIDTH + column
            total += tl.load(theirs, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    stored = (total + before).to(residual.dtype.element_ty)
    tl.store(before_place, stored, mask=inside)
    x = stored.to(tl.float32)  # the norm of what later layers will read
    x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(out + row * out_stride + column, (x * factor).to(out.dtype.element_ty), mask=inside)


def reduce_add_rms_norm(
    x_parts: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float, out_th: Tensor, inbox: Inbox
) -> None:
    """residual += the sum of all ranks' x, each rounded to the dtype of `out`; out = rms_norm(residual). Every rank
    must call this at the same places, with as many rows: at most `inbox.max_rows`."""
    num_parts, num_tokens, part_stride, row_stride = layout_of_parts(x_parts)
    assert num_tokens <= inbox.max_rows and out_th.dtype == inbox.dtype and out_th.shape[1] == inbox.width
    block = triton.next_power_of_2(inbox.width)
    _reduce_norm_kernel[(num_tokens,)](
        x_parts, residual_th, weight_h, out_th, inbox.memory.addresses, inbox.counts, eps,
        part_stride, row_stride, residual_th.stride(0), out_th.stride(0),
        WIDTH=inbox.width, BLOCK=block, NUM_PARTS=num_parts, RANK=inbox.rank, SIZE=inbox.size,
        MAX_ROWS=inbox.max_rows, COUNTS=2 * inbox.size * inbox.max_rows * inbox.width * inbox.dtype.itemsize,
        MAX_POLLS=MAX_POLLS, ON_GPU=out_th.is_cuda,
        num_warps=max(1, min(32, block // 256)), **pdl_options(out_th.device),
    )  # fmt: skip


@triton.jit
def _embedding_kernel(
    token_ids, addresses, out, scale, num_rows, out_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """token_ids [t] → out [t, WIDTH]: BLOCK columns of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    await_inputs(PDL)
    token = tl.load(token_ids + row).to(tl.int64)
    token = tl.where((token >= 0) & (token < SIZE * num_rows), token, 0)
    table = tl.load(addresses + token // num_rows).to(tl.pointer_type(out.dtype.element_ty))
    table = tl.multiple_of(table, 16)
    values = tl.load(table + (token % num_rows) * WIDTH + column, mask=inside).to(tl.float32) * scale
    tl.store(out + row * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


def embedding(token_ids_t: Tensor, addresses_s: Tensor, num_rows: int, scale: float, out_th: Tensor) -> None:
    """Rows of a table of which each rank has `num_rows` in the dtype of `out`, times `scale`. An id outside the
    vocabulary reads row 0."""
    num_tokens, width = out_th.shape
    block = min(2048, triton.next_power_of_2(width))
    _embedding_kernel[(num_tokens, triton.cdiv(width, block))](
        token_ids_t, addresses_s, out_th, scale, num_rows, out_th.stride(0), SIZE=addresses_s.shape[0],
        WIDTH=width, BLOCK=block, num_warps=max(1, block // 512), **pdl_options(out_th.device),
    )  # fmt: skip
