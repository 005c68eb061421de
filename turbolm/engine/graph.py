"""Recording a model's step once, to replay it without Python: the same batches, the same results.

On the CPU a plan of native instructions serves steps of any shape; on a GPU, CUDA graphs serve steps
of decodes alone, one graph per number of sequences (`DecodeGraphs`).
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from turbolm.engine.batch import Ints, StepArrays, num_columns
from turbolm.ops import LayerCache, Ops
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.cpu.plan import NotRecordableError, Plan, PlanRecorder
from turbolm.types import Batch

log = logging.getLogger(__name__)

#: The model's step: a batch → float32 logits [r, v] of its `logit_rows`.
Forward = Callable[[Batch], Tensor]


class Model(Protocol):
    """A model whose `forward` calls nothing but `ops` on activations."""

    @property
    def ops(self) -> Ops: ...

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor: ...


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


def record(model: Model, caches: Sequence[LayerCache], limits: Limits) -> Forward:
    """The model's forward pass over `caches`: a replayed plan where its backend records one, else
    plain calls. Steps larger than `limits` are refused."""
    if isinstance(model.ops, CpuOps):
        try:
            return record_plan(model, model.ops, caches, limits).run
        except NotRecordableError as error:
            log.warning("steps are computed op by op, which is slower: %s", error)
    return lambda batch: model.forward(batch, caches)


def record_plan(model: Model, ops: CpuOps, caches: Sequence[LayerCache], limits: Limits) -> Plan:
    """One pass of the model over buffers instead of tensors. Raises NotRecordableError."""
    recorder = PlanRecorder(limits.max_batch_tokens, limits.max_logit_rows, limits.max_context)
    with ops.recording(recorder):
        logits = model.forward(_largest_batch(limits), caches)
    plan = Plan(ops.team, recorder, num_logits=int(logits.shape[1]))
    log.info("recorded a plan of %d instructions, %d barriers", len(plan), sum(plan.barriers))
    return plan


def _largest_batch(limits: Limits) -> Batch:
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
    )


def graph_sizes(max_batch_size: int) -> list[int]:
    """Numbers of sequences that have a graph of their own; others are padded to the next one."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch_size, 32)]
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


_Key = tuple[int, int]  # longest context, number of sequences
_SHORT_CONTEXT = 1024  # steps of contexts up to this have graphs of their own: their attention runs differently


class DecodeGraphs:
    """CUDA graphs of the steps that compute one token per sequence. Inputs are copied to where the
    graphs read them; rows that pad a step belong to no sequence (context 0) and store nothing (slot -1)."""

    def __init__(self, forward: Forward, limits: Limits, block_size: int, device: torch.device) -> None:
        self._forward = forward
        self._limits = limits
        self._device = device
        self._columns = num_columns(limits.max_context, block_size)
        self._sizes = graph_sizes(limits.max_batch_size)
        contexts = {limits.max_context, min(limits.max_context, _SHORT_CONTEXT)}
        self._pending = sorted(itertools.product(contexts, self._sizes))  # captured from the end on
        self._captured: dict[_Key, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        size = limits.max_batch_size
        self._inputs = torch.zeros(self.input_length, dtype=torch.int32, device=device)
        self._counting = torch.arange(size + 1, dtype=torch.int32, device=device)

    def find(self, arrays: StepArrays) -> _Key | None:
        """The captured graph that serves the step; None: it has to be computed without one."""
        count = arrays.num_decodes
        if arrays.max_query != 1 or len(arrays.logit_rows) != count or count > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, count)]
        keys = [(_SHORT_CONTEXT, size)] if arrays.max_context <= _SHORT_CONTEXT else []
        keys.append((self._limits.max_context, size))
        return next((key for key in keys if key in self._captured), None)

    @property
    def input_length(self) -> int:
        """int32 elements that `fill` may write."""
        size = self._sizes[-1]
        return 4 * _stride(size) + size * self._columns

    def fill(self, arrays: StepArrays, size: int, host: Ints) -> int:
        """Write the step's inputs into `host` as the graph of `size` expects them; how many elements
        are to be copied."""
        count, stride = len(arrays.token_ids), _stride(size)
        head = host[: 4 * stride].reshape(4, stride)
        for row, (array, padding) in zip(
            head,
            ((arrays.token_ids, 0), (arrays.positions, 0), (arrays.slots, -1), (arrays.context_lens, 0)),
            strict=True,
        ):
            row[:count] = array
            row[count:] = padding
        length = 4 * stride + count * self._columns
        tables = host[4 * stride : length].reshape(count, self._columns)
        tables[:, : arrays.block_tables.shape[1]] = arrays.block_tables
        return length

    def inputs(self, length: int) -> Tensor:
        """Where `fill`'s first `length` elements are to be copied to, on the device."""
        return self._inputs[:length]

    def token_ids(self, size: int) -> Tensor:
        return self._inputs[:size]

    def replay(self, key: _Key) -> Tensor:
        """Compute → logits [size, v], valid until the next step."""
        graph, logits = self._captured[key]
        graph.replay()
        return logits

    def capture_next(self) -> bool:
        """Capture the largest size that has no graph yet; False: all have one. Nothing else may be
        computed meanwhile."""
        if not self._pending:
            return False
        max_context, size = key = self._pending.pop()
        self._inputs.zero_()
        batch = self._batch(size, max_context)
        batch.slots.fill_(-1)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._forward(batch)  # compiles kernels, and lets libraries allocate
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = self._forward(batch)
        self._captured[key] = (graph, logits)
        return True

    def _batch(self, size: int, max_context: int) -> Batch:
        stride = _stride(size)
        head = self._inputs[: 4 * stride].view(4, stride)[:, :size]
        return Batch(
            token_ids=head[0],
            positions=head[1],
            slots=head[2],
            query_start=self._counting[: size + 1],
            context_lens=head[3],
            block_tables=self._inputs[4 * stride :][: size * self._columns].view(size, self._columns),
            logit_rows=self._counting[:size],
            num_tokens=size,
            num_sequences=size,
            max_query=1,
            max_context=max_context,
            num_decodes=size,
        )


def _stride(size: int) -> int:
    """Elements from one input to the next: each begins at a multiple of 16 bytes, as kernels are compiled for."""
    return -(-size // 4) * 4
