"""Recording a model's step once, to replay it without Python: the same batches, the same results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

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
