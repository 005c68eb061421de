"""Recording a model's step once, to replay it without Python: the same batches, the same results.

On the CPU a plan of native instructions serves steps of any shape; on a GPU, CUDA graphs serve steps of
decodes alone, and small ones whose tokens are laid out as decodes, one graph per number of rows (`DecodeGraphs`).
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turbolm.engine.batch import Ints, StepArrays, num_columns
from turbolm.fallbacks import note_fallback
from turbolm.ops import LayerCache, Ops
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.cpu.plan import NotRecordableError, Plan, PlanRecorder
from turbolm.types import Batch

log = logging.getLogger(__name__)

#: The model's step: a batch → float32 logits [r, v] of its `logit_rows`.
Forward = Callable[[Batch], Tensor]

#: The same step → these logits, and the hidden states [t, h] that they are made of. Both are valid until the next.
ForwardHidden = Callable[[Batch], tuple[Tensor, Tensor]]


class Steps(NamedTuple):
    """A model's steps over its KV cache: they compute the same, and differ in what they hand out."""

    forward: Forward
    forward_hidden: ForwardHidden


class Parts(Protocol):
    """A model in two parts: everything up to the final norm, and the logits."""

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor: ...
    def hidden_states(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor: ...
    def logits(self, x_th: Tensor, batch: Batch) -> Tensor: ...


class Model(Parts, Protocol):
    """A model that calls nothing but `ops` on activations."""

    @property
    def ops(self) -> Ops: ...


class Limits(Protocol):
    """The largest step: a `ResolvedConfig` says it."""

    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def max_batch_size(self) -> int: ...
    @property
    def max_logit_rows(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def block_size(self) -> int: ...


def record(model: Model, caches: Sequence[LayerCache], limits: Limits, *, has_adapters: bool = False) -> Steps:
    """The model's steps over `caches`: a replayed plan where its backend records one, else
    plain calls. Steps larger than `limits` are refused. `has_adapters`: the model has room for some."""
    if isinstance(model.ops, CpuOps):
        try:
            plan = record_plan(model, model.ops, caches, limits)
            if not has_adapters:
                return Steps(plan.run, plan.run_hidden)
            # Steps in which no row has an adapter cost what they would without.
            adapted = record_plan(model, model.ops, caches, limits, has_adapters=True)
            return Steps(
                lambda batch: (plan if batch.adapters is None else adapted).run(batch),
                lambda batch: (plan if batch.adapters is None else adapted).run_hidden(batch),
            )
        except NotRecordableError as error:
            note_fallback(log, f"steps are computed op by op, which is slower: {error}")
    return plain_steps(model, caches)


def plain_steps(model: Parts, caches: Sequence[LayerCache]) -> Steps:
    """Calls of the model."""

    def forward_hidden(batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = model.hidden_states(batch, caches)
        return model.logits(hidden, batch), hidden

    return Steps(lambda batch: model.forward(batch, caches), forward_hidden)


def record_plan(
    model: Model, ops: CpuOps, caches: Sequence[LayerCache], limits: Limits, *, has_adapters: bool = False
) -> Plan:
    """One pass of the model over buffers instead of tensors. Raises NotRecordableError."""
    recorder = PlanRecorder(limits.max_batch_tokens, limits.max_logit_rows, limits.max_context)
    with ops.recording(recorder):
        batch = _largest_batch(limits, has_adapters)
        hidden = model.hidden_states(batch, caches)
        logits = model.logits(hidden, batch)
    plan = Plan(ops.team, recorder, num_logits=int(logits.shape[1]), hidden=hidden)
    log.info("recorded a plan of %d instructions, %d barriers", len(plan), sum(plan.barriers))
    return plan


def _largest_batch(limits: Limits, has_adapters: bool) -> Batch:
    """Tensors of the largest sizes. Nobody looks at their values."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32)

    tokens, sequences = limits.max_batch_tokens, limits.max_batch_size
    return Batch(
        token_ids=empty(tokens),
        positions=empty(tokens),
        slots=empty(tokens),
        query_start=empty(sequences + 1),
        context_lens=empty(sequences),
        block_tables=empty(sequences, 1),
        logit_rows=empty(limits.max_logit_rows),
        num_tokens=tokens,
        num_sequences=sequences,
        max_query=tokens,
        max_context=limits.max_context,
        adapters=empty(tokens) if has_adapters else None,
    )


def graph_sizes(max_batch_size: int) -> list[int]:
    """Numbers of sequences that have a graph of their own; others are padded to the next one."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch_size, 32)]
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


_SHARED_SIZES = (2, 4, 8, 16, 24, 32, 48, 64)
MAX_SHARED_ROWS = _SHARED_SIZES[-1]
"""Of a step in which several rows may be of one sequence: drafts, or tokens of prompts."""


class GraphKey(NamedTuple):
    """What a graph serves."""

    shares_context: bool  # rows are several of one sequence
    max_context: int
    size: int  # rows


_SHORT_CONTEXT = 1024  # steps of contexts up to this have graphs of their own: their attention runs differently


class DecodeGraphs:
    """CUDA graphs of the steps in which every row attends by itself. Inputs are copied to where the graphs read
    them; rows that pad a step belong to no sequence (context 0) and store nothing (slot -1)."""

    def __init__(
        self,
        forward: Forward,
        limits: Limits,
        block_size: int,
        device: torch.device,
        *,
        has_adapters: bool = False,
        max_shared_rows: int = 0,
    ) -> None:
        """With `has_adapters`, every graph adds what the rows' adapters do. `max_shared_rows`: of steps in which
        several rows may be of one sequence, at most MAX_SHARED_ROWS."""
        self._forward = forward
        self._limits = limits
        self._device = device
        self._columns = num_columns(limits.max_context, block_size)
        self._num_heads = 5 if has_adapters else 4  # inputs of one element per row
        sizes = graph_sizes(limits.max_batch_size)
        contexts = {limits.max_context, min(limits.max_context, _SHORT_CONTEXT)}
        shared = [size for size in _SHARED_SIZES if size <= max_shared_rows]
        keys = [*itertools.product((False,), contexts, sizes), *itertools.product((True,), contexts, shared)]
        # Captured from the end on: those of several rows per sequence last.
        self._pending = sorted((GraphKey(*key) for key in keys), key=lambda key: (not key.shares_context, *key[1:]))
        self._captured: dict[GraphKey, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sizes_by_kind = {False: sizes, True: shared}
        size = max(limits.max_batch_size, max_shared_rows)
        self._inputs = torch.zeros(self.input_length, dtype=torch.int32, device=device)
        self._counting = torch.arange(size + 1, dtype=torch.int32, device=device)

    def find(self, arrays: StepArrays) -> GraphKey | None:
        """The captured graph that serves the step; None: it has to be computed without one."""
        count = arrays.num_decodes
        sizes = self._sizes_by_kind[arrays.shares_context]
        if arrays.max_query != 1 or count != len(arrays.token_ids) or not sizes or count > sizes[-1]:
            return None
        size = sizes[bisect_left(sizes, count)]
        contexts = (_SHORT_CONTEXT, self._limits.max_context)
        keys = [GraphKey(arrays.shares_context, most, size) for most in contexts if arrays.max_context <= most]
        return next((key for key in keys if key in self._captured), None)

    @property
    def input_length(self) -> int:
        """int32 elements that `fill` may write."""
        size = max(sizes[-1] for sizes in self._sizes_by_kind.values() if sizes)
        return self._num_heads * _stride(size) + size * self._columns

    def fill(self, arrays: StepArrays, size: int, host: Ints) -> int:
        """Write the step's inputs into `host` as the graph of `size` expects them; how many elements
        are to be copied."""
        count, stride, num_heads = len(arrays.token_ids), _stride(size), self._num_heads
        head = host[: num_heads * stride].reshape(num_heads, stride)
        adapters = -1 if arrays.adapters is None else arrays.adapters
        for row, (array, padding) in zip(
            head,
            (
                (arrays.token_ids, 0),
                (arrays.positions, 0),
                (arrays.slots, -1),
                (arrays.context_lens, 0),
                (adapters, -1),
            ),
            strict=False,
        ):
            row[:count] = array
            row[count:] = padding
        length = num_heads * stride + count * self._columns
        tables = host[num_heads * stride : length].reshape(count, self._columns)
        tables[:, : arrays.block_tables.shape[1]] = arrays.block_tables
        return length

    def inputs(self, length: int) -> Tensor:
        """Where `fill`'s first `length` elements are to be copied to, on the device."""
        return self._inputs[:length]

    def token_ids(self, size: int) -> Tensor:
        return self._inputs[:size]

    def replay(self, key: GraphKey) -> Tensor:
        """Compute → logits [size, v] of all rows, valid until the next step."""
        graph, logits = self._captured[key]
        graph.replay()
        return logits

    def capture_next(self) -> bool:
        """Capture the largest size that has no graph yet; False: all have one. Nothing else may be
        computed meanwhile."""
        if not self._pending:
            return False
        key = self._pending.pop()
        self._inputs.zero_()
        batch = self._batch(key)
        batch.slots.fill_(-1)
        if batch.adapters is not None:
            batch.adapters.fill_(-1)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._forward(batch)  # compiles kernels, and lets libraries allocate
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = self._forward(batch)
        self._captured[key] = (graph, logits)
        return True

    def _batch(self, key: GraphKey) -> Batch:
        size, num_heads = key.size, self._num_heads
        stride = _stride(size)
        head = self._inputs[: num_heads * stride].view(num_heads, stride)[:, :size]
        return Batch(
            token_ids=head[0],
            positions=head[1],
            slots=head[2],
            query_start=self._counting[: size + 1],
            context_lens=head[3],
            block_tables=self._inputs[num_heads * stride :][: size * self._columns].view(size, self._columns),
            logit_rows=self._counting[:size],
            num_tokens=size,
            num_sequences=size,
            max_query=1,
            max_context=key.max_context,
            num_decodes=size,
            shares_context=key.shares_context,
            adapters=head[4] if num_heads > 4 else None,
        )


def _stride(size: int) -> int:
    """Elements from one input to the next: each begins at a multiple of 16 bytes, as kernels are compiled for."""
    return -(-size // 4) * 4
