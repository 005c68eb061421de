"""From a scheduled step to the arrays of a `Batch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from turbolm.engine.step import ScheduledSequence, Step
from turbolm.types import Batch, Sequence

Ints = NDArray[np.int32]


class StepArrays(NamedTuple):
    """A `Batch` on the host: its fields hold the same, as int32 arrays."""

    token_ids: Ints
    positions: Ints
    slots: Ints
    query_start: Ints
    context_lens: Ints
    block_tables: Ints
    logit_rows: Ints
    max_query: int
    max_context: int
    num_decodes: int
    chunks: tuple[tuple[int, int, int], ...]
    adapters: Ints | None = None
    shares_context: bool = False

    def batch(self, tensor: Callable[[Ints], Tensor]) -> Batch:
        """As tensors, made by `tensor`."""
        return Batch(
            token_ids=tensor(self.token_ids),
            positions=tensor(self.positions),
            slots=tensor(self.slots),
            query_start=tensor(self.query_start),
            context_lens=tensor(self.context_lens),
            block_tables=tensor(self.block_tables),
            logit_rows=tensor(self.logit_rows),
            num_tokens=len(self.token_ids),
            num_sequences=len(self.context_lens),
            max_query=self.max_query,
            max_context=self.max_context,
            num_decodes=self.num_decodes,
            chunks=self.chunks,
            adapters=None if self.adapters is None else tensor(self.adapters),
            shares_context=self.shares_context,
        )


def lay_out(
    step: Step,
    block_size: int,
    logit_rows: list[list[int]],
    row_before: Mapping[Sequence, int] | None = None,
) -> StepArrays:
    """The step's tokens end to end. `logit_rows`: for each item, the rows of its tokens whose logits are
    wanted. `row_before`: where the step before this one sampled what a token follows; such a token's id
    becomes -1 - row, to be replaced on the device."""
    items = step.items
    is_single = step.num_tokens == len(items)  # one token of each sequence
    counts = np.ones(len(items), np.int32) if is_single else np.array([item.num_tokens for item in items], np.int32)
    first_positions = np.array([item.start for item in items], np.int32)
    starts = np.zeros(len(items) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    contexts = first_positions + counts
    max_context, max_query = int(contexts.max()), int(counts.max())
    tables = _block_tables(items, -(-contexts // block_size), num_columns(max_context, block_size))
    if is_single:
        positions, owners = first_positions, np.arange(len(items))
    else:
        owners = np.repeat(np.arange(len(items)), counts)
        positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(first_positions - starts[:-1], counts)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    rows = [start + row for start, wanted in zip(starts.tolist(), logit_rows, strict=False) for row in wanted]
    num_decodes, chunks = _split(counts.tolist(), starts.tolist(), contexts.tolist())
    return StepArrays(
        np.array(_token_ids(items, row_before), np.int32),
        positions,
        slots.astype(np.int32, copy=False),
        starts,
        contexts,
        tables,
        np.array(rows, np.int32),
        max_query,
        max_context,
        num_decodes,
        chunks,
        adapters_of(items),
    )


def adapters_of(items: tuple[ScheduledSequence, ...]) -> Ints | None:
    """[t] places of the rows' adapters; None where there are none."""
    loaded = [item.sequence.request.loaded_adapter for item in items]
    if not any(loaded):
        return None
    places = np.array([-1 if own is None else own.place for own in loaded], np.int32)
    return np.repeat(places, [item.num_tokens for item in items])


def num_columns(max_context: int, block_size: int) -> int:
    """Of a block table."""
    return -(-max_context // block_size)


def _block_tables(items: tuple[ScheduledSequence, ...], num_blocks: Ints, width: int) -> Ints:
    """[s, width] the first so many blocks of each sequence, then 0."""
    blocks: list[int] = []
    for item, count in zip(items, num_blocks.tolist(), strict=True):
        blocks += item.sequence.blocks[:count]
    tables = np.zeros((len(items), width), np.int32)
    tables[np.arange(width) < num_blocks[:, None]] = blocks
    return tables


def _token_ids(items: tuple[ScheduledSequence, ...], row_before: Mapping[Sequence, int] | None) -> list[int]:
    tokens: list[int] = []
    for item in items:
        if item.follows:
            assert row_before is not None
            tokens.append(-1 - row_before[item.sequence])
        else:
            tokens += item.sequence.token_ids[item.start : item.start + item.num_new_tokens]
            tokens += item.drafts
    return tokens


def _split(counts: list[int], starts: list[int], contexts: list[int]) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """How many leading sequences have one token, and the others' chunks."""
    num_decodes = 0
    while num_decodes < len(counts) and counts[num_decodes] == 1:
        num_decodes += 1
    rest = range(num_decodes, len(counts))
    return num_decodes, tuple((starts[i], counts[i], contexts[i]) for i in rest)
