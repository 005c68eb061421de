"""Prompts as vectors: what becomes of their tokens' hidden states after the final norm.

e  chunks of prompts that a step pools    t  tokens of the step    h  hidden size
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbolm.engine.step import ScheduledSequence
from turbolm.types import Sequence

#: First row and the row after the last, in [t].
RowRange = tuple[int, int]


def pooled_rows(items: tuple[ScheduledSequence, ...]) -> list[RowRange]:
    """The rows of a step that are summed into a vector each, in the order of the items that have any: with "mean"
    each chunk's, with "last" the prompt's last token's."""
    ranges, start = [], 0
    for item in items:
        end = start + item.num_tokens
        if _is_pooled(item):
            is_mean = item.sequence.request.pooling == "mean"
            ranges.append((start if is_mean else end - 1, end))
        start = end
    return ranges


def sum_rows(hidden_th: Tensor, ranges: list[RowRange]) -> Tensor:
    """float32 [e, h]: each range's rows, added up in float32."""
    if all(end - first == 1 for first, end in ranges):
        return hidden_th[[first for first, _ in ranges]].float()
    return torch.stack([hidden_th[first:end].sum(0, dtype=torch.float32) for first, end in ranges])


class Pooler:
    """Puts the sums of chunks together. For one thread; steps come in order."""

    def __init__(self) -> None:
        self._sums: WeakKeyDictionary[Sequence, NDArray[np.float64]] = WeakKeyDictionary()  # of prompts so far

    def embeddings(self, items: tuple[ScheduledSequence, ...], sums_eh: Tensor) -> list[bytes | None]:
        """What each item's `StepResult` has. `sums_eh`: of the step's `pooled_rows`, on the host."""
        sums: Any = iter(sums_eh.numpy())
        return [self._add(item, next(sums)) if _is_pooled(item) else None for item in items]

    def _add(self, item: ScheduledSequence, chunk_h: NDArray[np.float32]) -> bytes | None:
        sequence = item.sequence
        if sequence.request.pooling == "last":
            return chunk_h.astype("<f4").tobytes()
        total = chunk_h.astype(np.float64)
        if item.start:  # otherwise it begins, perhaps once more after a preemption
            total += self._sums.get(sequence, 0.0)  # nothing where a step before failed, which ends the request
        if _is_last(item):
            return (total / sequence.num_prompt).astype("<f4").tobytes()
        self._sums[sequence] = total
        return None


def _is_pooled(item: ScheduledSequence) -> bool:
    pooling = item.sequence.request.pooling
    return pooling is not None and (pooling == "mean" or _is_last(item))


def _is_last(item: ScheduledSequence) -> bool:
    """Whether the prompt ends with this chunk."""
    return item.start + item.num_new_tokens == item.sequence.num_prompt
