"""Recorded plans: the same results as the ops, for any step, in memory that is shared safely."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.engine.graph import plain_steps, record, record_plan
from turbolm.errors import EngineError
from turbolm.ops import AttentionSpec, LayerCache, Ops, RopeTable
from turbolm.ops.cpu import instructions
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.cpu.plan import Buffer, Plan, PlanRecorder, Recorded
from turbolm.ops.reference import ReferenceOps
from turbolm.quant.dense import dense
from turbolm.types import Batch

HIDDEN, MLP, VOCABULARY, LAYERS = 96, 160, 211, 2
SPEC = AttentionSpec(6, 2, 16, 16, 0.25)


@dataclass(frozen=True)
class Limits:
    max_batch_tokens: int = 64
    max_batch_size: int = 8
    max_logit_rows: int = 16
    max_context: int = 256


LIMITS = Limits()


class TinyModel:
    """Every op that a decoder uses, once per layer."""

    def __init__(self, ops: Ops, has_head_norms: bool = False) -> None:
        self.ops = ops
        generator = torch.Generator().manual_seed(0)

        def linear(n: int, k: int, has_bias: bool = False) -> object:
            weight = torch.randn(n, k, generator=generator) * k**-0.5
            return ops.prepare_linear([dense(weight)], torch.randn(n, generator=generator) if has_bias else None)

        self.table = ops.prepare_embedding(dense(torch.randn(VOCABULARY, HIDDEN, generator=generator)))
        self.layers = [
            (linear(SPEC.qkv_width, HIDDEN, True), linear(HIDDEN, 96), linear(2 * MLP, HIDDEN), linear(HIDDEN, MLP))
            for _ in range(LAYERS)
        ]
        self.norm = torch.randn(HIDDEN, generator=generator)
        angles = torch.outer(torch.arange(256.0), 50.0 ** -(torch.arange(0.0, 16, 2) / 16))
        self.rope = RopeTable(angles.cos(), angles.sin())
        self.head_norm = torch.randn(16, generator=generator) if has_head_norms else None

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        return self.logits(self.hidden_states(batch, caches), batch)

    def logits(self, x_th: Tensor, batch: Batch) -> Tensor:
        return self.ops.logits(x_th, batch, self.table, 30.0)  # type: ignore[arg-type]

    def hidden_states(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        ops = self.ops
        residual = ops.embedding(batch.token_ids, self.table, 1.5)
        x = ops.rms_norm(residual, self.norm, 1e-5)
        for (qkv, output, gate_up, down), cache in zip(self.layers, caches, strict=True):
            norm = self.head_norm
            row = ops.rotary_store(ops.linear(x, qkv), batch, cache, SPEC, self.rope, norm, norm, 1e-5)  # type: ignore[arg-type]
            x = ops.linear(ops.attention(row, batch, cache, SPEC), output)  # type: ignore[arg-type]
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
            x = ops.linear(ops.activate_multiply(ops.linear(x, gate_up), "silu"), down)  # type: ignore[arg-type]
            residual = ops.add(x, residual)
            x = ops.rms_norm(residual, self.norm, 1e-5)
        return x


def make_caches(kind: str = "float16", block_size: int = 16) -> list[LayerCache]:
    def memory(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(640 // block_size, 2, block_size, width, dtype=dtype)

    def cache() -> LayerCache:
        if kind != "int8":
            return LayerCache(*(memory(16, getattr(torch, kind)) for _ in range(2)))
        codes, scales = (memory(16, torch.uint8) for _ in range(2)), (memory(2, torch.float16) for _ in range(2))
        return LayerCache(*codes, *scales, "int8", "int8")

    return [cache() for _ in range(LAYERS)]


def make_batch(parts: list[tuple[int, int, int]], all_rows: bool = False) -> Batch:
    """A step of (sequence, cached tokens, new tokens); sequence i has blocks 5 i to 5 i + 4."""

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    positions = [p for _, cached, new in parts for p in range(cached, cached + new)]
    owners = [sequence for sequence, _, new in parts for _ in range(new)]
    starts = [0, *itertools.accumulate(new for _, _, new in parts)]
    rows = list(range(starts[-1])) if all_rows else [start - 1 for start in starts[1:]]
    return Batch(
        token_ids=ints([(31 * p + 7 * s) % VOCABULARY for p, s in zip(positions, owners, strict=True)]),
        positions=ints(positions),
        slots=ints([s * 80 + p for p, s in zip(positions, owners, strict=True)]),
        query_start=ints(starts),
        context_lens=ints([cached + new for _, cached, new in parts]),
        block_tables=ints([range(5 * sequence, 5 * sequence + 5) for sequence, _, _ in parts]),
        logit_rows=ints(rows),
        num_tokens=len(positions),
        num_sequences=len(parts),
        max_query=max(new for _, _, new in parts),
        max_context=max(cached + new for _, cached, new in parts),
    )


STEPS = [
    [(0, 0, 1)],
    [(0, 1, 40), (3, 0, 11)],
    [(0, 41, 1), (3, 11, 1), (5, 0, 50)],
    [(5, 50, 1), (0, 42, 1), (3, 12, 1)],
    [(7, 0, 64)],
]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_replay_is_bitwise_the_ops(threads: int) -> None:
    """One recording serves steps of every shape, with the results of the single ops."""
    model = TinyModel(CpuOps(threads=threads))
    caches, eager_caches = make_caches(), make_caches()
    forward = record(model, caches, LIMITS).forward
    for parts in STEPS:
        batch = make_batch(parts)
        assert torch.equal(forward(batch), model.forward(batch, eager_caches))
    for cache, eager_cache in zip(caches, eager_caches, strict=True):
        assert torch.equal(cache.k, eager_cache.k) and torch.equal(cache.v, eager_cache.v)


def test_replay_agrees_with_the_reference() -> None:
    model, reference = TinyModel(CpuOps(threads=2)), TinyModel(ReferenceOps(torch.device("cpu"), torch.float32))
    caches, reference_caches = make_caches("float32"), make_caches("float32")
    forward = record(model, caches, LIMITS).forward
    for parts in STEPS:
        batch = make_batch(parts)
        torch.testing.assert_close(forward(batch), reference.forward(batch, reference_caches), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_hidden_states_of_a_replay_are_those_of_the_ops(threads: int) -> None:
    """All tokens', with the logits, in steps of one token too; and plain calls hand out the same."""
    model = TinyModel(CpuOps(threads=threads))
    steps = record(model, make_caches(), LIMITS)
    plain = plain_steps(model, make_caches())
    for parts in STEPS:
        batch = make_batch(parts)
        logits, hidden = steps.forward_hidden(batch)
        plain_logits, plain_hidden = plain.forward_hidden(batch)
        assert hidden.shape == (batch.num_tokens, HIDDEN)
        assert torch.equal(hidden, plain_hidden) and torch.equal(logits, plain_logits)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["float16", "float32", "int8"])
def test_lone_tokens_are_bitwise_the_ops(threads: int, kind: str) -> None:
    """Steps of one token, where threads share less: the same logits and cache, for contexts on both
    sides of what attention takes at once."""
    model = TinyModel(CpuOps(threads=threads), has_head_norms=True)
    caches, eager_caches = make_caches(kind), make_caches(kind)
    forward = record(model, caches, LIMITS).forward
    for start, new in [(0, 1), (1, 1), (2, 60), (62, 1), (63, 60), (123, 1), (124, 2), (126, 1), (127, 1), (128, 1)]:
        tables = torch.arange(10, dtype=torch.int32)[None]
        batch = replace(make_batch([(0, start, new)]), block_tables=tables)
        assert torch.equal(forward(batch), model.forward(batch, eager_caches))
    for cache, eager_cache in zip(caches, eager_caches, strict=True):
        assert torch.equal(cache.k, eager_cache.k) and torch.equal(cache.v, eager_cache.v)


def test_logits_do_not_depend_on_steps_or_company() -> None:
    """A token's logits are the same bits however the prompt was cut and whatever ran beside it."""
    model = TinyModel(CpuOps(threads=2))
    forward = record(model, make_caches(), LIMITS).forward
    forward(make_batch([(1, 0, 60)]))
    alone = forward(make_batch([(1, 60, 1)])).clone()
    for cuts in ([7, 53], [1, 1, 58], [32, 28]):
        done = 0
        for new in cuts:
            forward(make_batch([(4, done // 3, 2), (1, done, new)]))
            done += new
        assert torch.equal(forward(make_batch([(6, 0, 3), (1, 60, 1)]))[1:], alone)


def test_larger_steps_than_recorded_are_refused() -> None:
    forward = record(TinyModel(CpuOps(threads=1)), make_caches(), LIMITS).forward
    with pytest.raises(EngineError, match="a step of 65 tokens"):
        forward(make_batch([(0, 0, 65)]))
    with pytest.raises(EngineError, match="17 rows of logits"):
        forward(make_batch([(0, 0, 17)], all_rows=True))


def test_model_that_needs_the_reference_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """It runs op by op, and the log says why."""
    model, caches = TinyModel(CpuOps(threads=1)), make_caches(block_size=4)
    batch = make_batch([(0, 0, 4)])
    logits = record(model, caches, LIMITS).forward(batch)
    assert torch.equal(logits, model.forward(batch, make_caches(block_size=4)))
    assert any("op by op" in record.message and "in blocks of 4" in record.message for record in caplog.records)


def test_plan_shares_memory() -> None:
    """Activations of all layers fit in the memory of one, and the threads meet once per dependence."""
    ops = CpuOps(threads=2)
    plan = record_plan(TinyModel(ops), ops, make_caches(), LIMITS)
    one_of_each = 64 * 4 * (3 * HIDDEN + SPEC.qkv_width + 96 + 3 * MLP)
    assert plan.num_bytes < one_of_each + 1_000_000  # workspaces
    assert sum(plan.barriers) < len(plan)


def test_threads_meet_five_times_a_layer_for_one_token() -> None:
    """Once for each result that no thread has alone: qkv, attention, its projection, gate and up, down."""
    ops = CpuOps(threads=2)
    plan = record_plan(TinyModel(ops), ops, make_caches(), LIMITS)
    assert sum(plan.lone_barriers) <= 5 * LAYERS + 1  # the head's soft cap


@st.composite
def programs(draw: st.DrawFn) -> list[Recorded]:
    """Norms and products that each read up to two earlier results and write a new one."""
    buffers: list[Buffer] = []
    recorded = []
    for _ in range(draw(st.integers(1, 25))):
        sources = [draw(st.sampled_from(buffers)) for _ in range(2)] if buffers else [0, 0]
        target = Buffer((2, 1), draw(st.integers(1, 5)) * 40)
        if draw(st.booleans()):
            norm = {"x": sources[0], "residual": 0, "weight": sources[1] if draw(st.booleans()) else 0, "y": target}
            recorded.append(Recorded(instructions.RmsNorm, norm))  # type: ignore[arg-type]
        else:
            product = {"linear": 0, "x": sources[0], "y": target, "workspace": 0}
            recorded.append(Recorded(instructions.Linear, product))  # type: ignore[arg-type]
        buffers.append(target)
    return recorded


Span = tuple[int, int]


def overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@settings(max_examples=100, deadline=None)
@given(recorded=programs())
def test_memory_and_barriers_of_any_program(recorded: list[Recorded]) -> None:
    """Nothing that is still needed is overwritten, and a barrier stands between any two
    instructions that touch the same memory, unless both only read it."""
    ops = CpuOps(threads=2)
    plan = Plan(ops.team, PlanRecorder(2, 1, 1, recorded), num_logits=1)
    last_use = {b: i for i, item in enumerate(recorded) for b in item.buffers()}
    spans = [[(b.offset, b.offset + b.num_bytes) for b in item.buffers()] for item in recorded]
    results = [item.operands["y"] for item in recorded]
    for i, item in enumerate(recorded):
        target = results[i]
        assert isinstance(target, Buffer) and 0 <= target.offset <= plan.num_bytes - target.num_bytes
        for j in range(i):
            other = results[j]
            assert isinstance(other, Buffer)
            is_shared = overlap((other.offset, other.offset + other.num_bytes), spans[i][-1])
            assert not (is_shared and last_use[other] >= i), "overwritten while needed"
            if any(overlap(span, spans[i][-1]) for span in spans[j]) or other in item.buffers():
                assert any(plan.barriers[j + 1 : i + 1]), "no barrier between"


@settings(max_examples=100, deadline=None)
@given(recorded=programs())
def test_lone_tokens_of_any_program(recorded: list[Recorded]) -> None:
    """In steps of one token, no thread touches what another one writes before they have met, and each
    reads the copies that were written: its own, or the one that all share."""
    ops = CpuOps(threads=2)
    plan = Plan(ops.team, PlanRecorder(2, 1, 1, recorded), num_logits=1)

    def has(i: int, flag: int) -> bool:
        return bool(plan._instructions[i].flags & flag)

    def accesses(i: int, thread: int) -> tuple[list[Span], list[Span]]:
        """What the thread reads and writes."""
        own_input = recorded[i].buffers(("x",)) if has(i, instructions.OWN_INPUT) else []
        own_output = recorded[i].buffers(("y",)) if has(i, instructions.OWN_OUTPUT) else []

        def span(buffer: Buffer) -> Span:
            if buffer not in own_input + own_output:
                return buffer.offset, buffer.offset + buffer.num_bytes
            row = buffer.offset + thread * buffer.num_bytes // 2
            return row, row + buffer.num_bytes // 2

        return [span(b) for b in recorded[i].buffers()], [span(b) for b in recorded[i].buffers(("y",))]

    is_own = {item.operands["y"]: has(i, instructions.OWN_OUTPUT) for i, item in enumerate(recorded)}
    for i, item in enumerate(recorded):
        for name in ("x", "weight"):
            for source in item.buffers((name,)):
                assert is_own[source] == (name == "x" and has(i, instructions.OWN_INPUT))
        for j in range(i):
            if any(plan.lone_barriers[j + 1 : i + 1]):
                continue
            for one, other in ((0, 1), (1, 0)):
                (reads, writes), (later_reads, later_writes) = accesses(j, one), accesses(i, other)
                assert not any(overlap(a, b) for a in writes for b in later_reads + later_writes)
                assert not any(overlap(a, b) for a in reads for b in later_writes)
