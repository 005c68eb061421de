"""Linear layers over more rows than fit the few-row kernel, while reading the weights still takes the time.

    t  rows of x    n, k  out and in features    p  parts that k was split into    f = n / 2

A program computes out^T = w x^T for a tile of rows of w: they are the long side of the tensor cores'
products and the rows of x the short one. Both come by TMA through a ring in shared memory, with 100 KB or more
in flight. x is read again for every tile, out of L2, so tiles are as high as the accumulators allow.

Where a multiple of 16 divides w's rows so that tiles x splits come close to the number of multiprocessors,
tiles have that many rows. Seen as [tiles, rows, k], w ends where a tile does: TMA fills up the block, whose
size is a power of two, with zeros that it doesn't read.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from turbolm.errors import EngineError
from turbolm.ops.cuda.plan import Output
from turbolm.ops.triton.launch import pdl_options
from turbolm.ops.triton.rows import _activate

__all__ = ["Output", "Plan", "linear_gated", "linear_logits", "linear_parts", "plan_wide", "run", "supports"]

MAX_TOKENS = 256
MAX_SPLITS = 16
MAX_STAGES = 8
BLOCK_K = 64
_SHARED = 226 << 10  # bytes per multiprocessor; the rest holds barriers
_SCRATCH = 32 << 10  # bytes beside the ring, to store one tile while the next is loaded

# Rates of an H200 in bytes per microsecond; only their ratios matter.
_HBM = 4.3e6
_L2 = 5.5e6
_ONE_SM = 0.1e6
_IMBALANCE = 0.15  # of the time that a multiprocessor works longer than the mean
_TILE = 0.3  # microseconds to store a tile

_PARTS: tl.constexpr = tl.constexpr(int(Output.PARTS))
_GATED: tl.constexpr = tl.constexpr(int(Output.GATED))


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch: `programs` x `splits` programs; program (i, s) computes tiles i, i + programs, … over the s-th
    share of k."""

    block_tokens: int  # of x, rounded up
    block_rows: int  # of w: what a tile is padded to (gated: twice, gate and up)
    block_k: int
    stages: int  # of the ring
    num_warps: int
    rows: int  # of w in a tile, of each half if gated
    tiles: int
    splits: int
    programs: int
    trigger: int = 4  # steps before its end that a program allows the next kernel to start; 0: when it ends
    prefetch: int = 0  # bytes of each row of the first tile that come into L2 before x is there

    @property
    def persistent(self) -> bool:
        return self.programs < self.tiles

    @property
    def flat(self) -> bool:
        """Whether tiles are full blocks (the last one may be ragged)."""
        return self.rows == self.block_rows


@triton.jit
def _prefetch(pointers, num_bytes):
    """Into L2; num_bytes (multiples of 16, or 0) from each of the pointers, which are aligned to 16 bytes."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [pointers.to(tl.int64), num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _allow_next(steps_left, TRIGGER: tl.constexpr):
    """Lets the next kernel start at TRIGGER steps left. Asm, as the pipeliner takes no branches."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $1, 0; @p griddepcontrol.launch_dependents; mov.u32 $0, 0; }",
        "=r,r", [steps_left - TRIGGER], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _step(x, w, tile, num_tiles, step, total, total_up, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
          OUTPUT: tl.constexpr, FLAT: tl.constexpr):  # fmt: skip
    """Adds block `step` of k to the products [BLOCK_ROWS, BLOCK_TOKENS] of a tile."""
    block_x = x.load([0, step * BLOCK_K]).T
    if FLAT:
        block_w = w.load([0, tile * BLOCK_ROWS, step * BLOCK_K])
    else:
        block_w = w.load([tile, 0, step * BLOCK_K])
    total = tl.dot(block_w.reshape(BLOCK_ROWS, BLOCK_K), block_x, total)
    if OUTPUT == _GATED:
        if FLAT:
            block_up = w.load([1, tile * BLOCK_ROWS, step * BLOCK_K])
        else:
            block_up = w.load([num_tiles + tile, 0, step * BLOCK_K])
        total_up = tl.dot(block_up.reshape(BLOCK_ROWS, BLOCK_K), block_x, total_up)
    return total, total_up


@triton.jit
def _finish(total, total_up, bias, out, tile, split, num_tokens, width, rows, BLOCK_TOKENS: tl.constexpr,
            BLOCK_ROWS: tl.constexpr, OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Stores a tile [BLOCK_ROWS, BLOCK_TOKENS] into out [t, width], or into part `split` of [p, t, width]."""
    row = tile * rows + tl.arange(0, BLOCK_ROWS)
    token = tl.arange(0, BLOCK_TOKENS)
    inside = row < tl.minimum((tile + 1) * rows, width)
    if BIAS:
        added = tl.load(bias + row, mask=inside & (split == 0), other=0.0)
        total += added.to(tl.float32)[:, None]
    if OUTPUT == _GATED:
        total = _activate(total, ACTIVATION) * total_up
    if OUTPUT == _PARTS:
        out += split.to(tl.int64) * num_tokens * width
    pointers = out + token[None, :] * width + row[:, None]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=inside[:, None] & (token < num_tokens)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_steps"])
def _linear_kernel(
    x, w, weight, bias, out, num_tokens, width, k, rows, num_tiles, num_steps,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, FLAT: tl.constexpr, PERSISTENT: tl.constexpr,
    TRIGGER: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [t, k] is a descriptor, and so is w: if FLAT [1, n, k] (gated: [2, f, k], gate and up), else
    [tiles, rows, k] (gated: twice the tiles, up after gate). weight is w's memory; bias [n], read if BIAS;
    out as Output says, of `width` features per row."""
    tl.assume(num_steps > 0)
    split = tl.program_id(0)
    first = split * num_steps // tl.num_programs(0)
    last = (split + 1) * num_steps // tl.num_programs(0)
    program = tl.program_id(1)
    if PDL:
        if PREFETCH > 0:
            row = program * rows + tl.arange(0, BLOCK_ROWS)
            start = weight + row.to(tl.int64) * k + first * BLOCK_K
            num_bytes = tl.minimum((tl.minimum(last * BLOCK_K, k) - first * BLOCK_K) * 2, PREFETCH)
            num_bytes = tl.where(row < tl.minimum((program + 1) * rows, width), num_bytes, 0)
            _prefetch(start, num_bytes)
            if OUTPUT == _GATED:
                _prefetch(start + width.to(tl.int64) * k, num_bytes)
        tl.extra.cuda.gdc_wait()
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    if PERSISTENT:
        stride = tl.num_programs(1)
        for tile in tl.range(program, num_tiles, stride, flatten=True):
            total = zeros
            total_up = zeros
            for step in range(num_steps):
                total, total_up = _step(x, w, tile, num_tiles, step, total, total_up, BLOCK_ROWS, BLOCK_K, OUTPUT, FLAT)
                if PDL and TRIGGER > 0:
                    _allow_next(tl.where(tile + stride < num_tiles, -1, num_steps - step), TRIGGER)
            _finish(total, total_up, bias, out, tile, split, num_tokens, width, rows,
                    BLOCK_TOKENS, BLOCK_ROWS, OUTPUT, ACTIVATION, BIAS)  # fmt: skip
    else:
        total = zeros
        total_up = zeros
        for step in range(first, last):
            total, total_up = _step(x, w, program, num_tiles, step, total, total_up, BLOCK_ROWS, BLOCK_K, OUTPUT, FLAT)
            if PDL and TRIGGER > 0:
                _allow_next(last - step, TRIGGER)
        _finish(total, total_up, bias, out, program, split, num_tokens, width, rows,
                BLOCK_TOKENS, BLOCK_ROWS, OUTPUT, ACTIVATION, BIAS)  # fmt: skip


@functools.cache
def supports(t: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether the functions below take x [t, k] and w [n, k] on the current GPU: compute capability 9, up to 256
    rows, k a multiple of 8, n even, bfloat16 or float16."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability()[0] != 9:
        return False
    num_sms = _num_sms(torch.device("cuda", torch.cuda.current_device()))
    return all(plan_wide(t, n, k, output, num_sms) is not None for output in Output)


def linear_parts(x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias → [p, t, n] float32, to be summed over p; or finished, [t, n] in the dtype of x."""
    plan = _plan_for(x_tk, weight_nk, Output.PARTS)
    shape = (x_tk.shape[0], weight_nk.shape[0])
    if plan.splits > 1:
        output, out = Output.PARTS, x_tk.new_empty((plan.splits, *shape), dtype=torch.float32)
    else:
        output, out = Output.ELEMENTS, x_tk.new_empty(shape)
    run(plan, output, x_tk, weight_nk, bias_n, out)
    return out


def linear_gated(x_tk: Tensor, weight_nk: Tensor, activation: Literal["silu", "gelu", "gelu_tanh"]) -> Tensor:
    """activation(x @ first half of weight.T) * (x @ second half of weight.T) → [t, f] in the dtype of x."""
    out = x_tk.new_empty((x_tk.shape[0], weight_nk.shape[0] // 2))
    run(_plan_for(x_tk, weight_nk, Output.GATED), Output.GATED, x_tk, weight_nk, None, out, activation)
    return out


def linear_logits(x_tk: Tensor, weight_nk: Tensor, out_tn: Tensor | None = None) -> Tensor:
    """x @ weight.T → [t, n] float32, into `out_tn` (contiguous) if given."""
    if out_tn is None:
        out_tn = x_tk.new_empty((x_tk.shape[0], weight_nk.shape[0]), dtype=torch.float32)
    run(_plan_for(x_tk, weight_nk, Output.FLOATS), Output.FLOATS, x_tk, weight_nk, None, out_tn)
    return out_tn


def run(
    plan: Plan,
    output: Output,
    x_tk: Tensor,
    weight_nk: Tensor,
    bias_n: Tensor | None,
    out: Tensor,
    activation: str = "silu",
    *,
    overlap: bool = True,
) -> None:
    """Launches a plan. weight, bias, out: contiguous. overlap: whether it may start before the kernel before it
    ends."""
    if x_tk.stride(1) != 1 or x_tk.stride(0) % 8 or x_tk.data_ptr() % 16:
        x_tk = x_tk.contiguous()
    assert weight_nk.is_contiguous() and out.is_contiguous() and weight_nk.data_ptr() % 16 == 0
    assert weight_nk.dtype == x_tk.dtype and weight_nk.shape[1] == x_tk.shape[1]
    (t, k), n = x_tk.shape, weight_nk.shape[0]
    halves = 2 if output is Output.GATED else 1
    shape = [halves, n // halves, k] if plan.flat else [halves * plan.tiles, plan.rows, k]
    x = TensorDescriptor(x_tk, [t, k], [x_tk.stride(0), 1], [plan.block_tokens, plan.block_k])
    w = TensorDescriptor(weight_nk, shape, [shape[1] * k, k, 1], [1, plan.block_rows, plan.block_k])
    options = pdl_options(x_tk.device) if overlap else {"PDL": False}
    num_steps = triton.cdiv(k, plan.block_k)
    _linear_kernel[(plan.splits, plan.programs)](
        x, w, weight_nk, weight_nk if bias_n is None else bias_n, out, t, out.shape[-1], k, plan.rows, plan.tiles,
        num_steps, BLOCK_TOKENS=plan.block_tokens, BLOCK_ROWS=plan.block_rows, BLOCK_K=plan.block_k,
        OUTPUT=int(output), ACTIVATION=activation if output is Output.GATED else "", BIAS=bias_n is not None,
        FLAT=plan.flat, PERSISTENT=plan.persistent, TRIGGER=min(plan.trigger, num_steps // plan.splits),
        PREFETCH=plan.prefetch, num_warps=plan.num_warps, num_stages=plan.stages, **options,
    )  # fmt: skip


def _plan_for(x_tk: Tensor, weight_nk: Tensor, output: Output) -> Plan:
    (t, k), n = x_tk.shape, weight_nk.shape[0]
    plan = plan_wide(t, n, k, output, _num_sms(x_tk.device))
    if plan is None:
        raise EngineError(f"no kernel for x [{t}, {k}] and w [{n}, {k}]: `supports` was not asked")
    return plan


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def plan_wide(t: int, n: int, k: int, output: Output, num_sms: int) -> Plan | None:
    """The best layout for x [t, k] and w [n, k]; None where the kernel doesn't run.

    Output.PARTS may come back with one split: then the kernel writes Output.ELEMENTS.
    """
    halves = 2 if output is Output.GATED else 1
    features = n // halves
    if not 1 <= t <= MAX_TOKENS or n % halves or features == 0 or k % 8 or k == 0:
        return None
    tokens = max(16, triton.next_power_of_2(t))
    max_rows = (256 if tokens <= 128 else 128) // halves
    max_splits = min(MAX_SPLITS, triton.cdiv(k, 4 * BLOCK_K)) if output is Output.PARTS else 1
    plans = [
        layout(tokens, features, rows, splits, halves, num_sms)
        for rows in range(16, max_rows + 1, 16)
        if features % rows == 0 or rows in (64, 128, 256)
        for splits in range(1, max_splits + 1)
    ]
    return min(plans, key=lambda plan: estimate(plan, output, k, num_sms))


def layout(tokens: int, features: int, rows: int, splits: int, halves: int, num_sms: int) -> Plan:
    """One program per multiprocessor with a ring as long as fits, which goes on over tiles if they are many."""
    block_rows, tiles = max(64, triton.next_power_of_2(rows)), triton.cdiv(features, rows)
    persistent = splits == 1 and tiles > num_sms
    stage_bytes = (halves * block_rows + tokens) * BLOCK_K * 2
    stages = min(MAX_STAGES, (_SHARED - (_SCRATCH if persistent else 0)) // stage_bytes)
    programs = num_sms if persistent else tiles
    return Plan(tokens, block_rows, BLOCK_K, stages, 8, rows, tiles, splits, programs)


def estimate(plan: Plan, output: Output, k: int, num_sms: int) -> float:
    """Microseconds."""
    features = plan.rows * plan.tiles
    weights = features * k * 2 * (2 if output is Output.GATED else 1)
    x_reads = plan.tiles * plan.block_tokens * k * 2
    # Parts are written, and read by the next kernel.
    results = plan.block_tokens * features * (8 * plan.splits if plan.splits > 1 else 4)
    tiles = -(-plan.tiles * plan.splits // num_sms)  # of the multiprocessor that has most
    share = tiles / (plan.tiles * plan.splits)
    readers = plan.splits * features * 4 / _ONE_SM if plan.splits > 1 else 0.0  # the next kernel has one per row
    bandwidth = max(weights / _HBM, (weights + x_reads + results) / _L2, (weights + x_reads) * share / _ONE_SM)
    return bandwidth * (1 + _IMBALANCE * (share * num_sms - 1)) + tiles * _TILE + readers
