"""Runs steps on a GPU without waiting for them: the host prepares the next step while the device computes.

The host reads what a step samples one step late. Only where a request asks for what the host has to compute
(log-probabilities, grammars) is a step's result awaited at once. A sequence's drafts are verified by rows of their own
among the decodes: each attends to the same blocks, one position further than the row before. So are short prompts, and
what a cached prefix leaves of longer ones: launching their kernels one by one takes longer. Where several processes
compute the model together, this is the one that leads: the others get each step as the arrays that it computes itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from turbolm.engine.adjustments import Adjuster, HostAdjustments, Row
from turbolm.engine.batch import Ints, StepArrays, adapters_of, lay_out, num_columns
from turbolm.engine.graph import MAX_SHARED_ROWS, Limits
from turbolm.engine.pooling import Pooler, RowRange, pooled_rows
from turbolm.engine.randomness import uniform
from turbolm.engine.runner import Completed, compute_results, logit_rows_of, with_embeddings
from turbolm.engine.sampler import Sampler, no_distribution
from turbolm.engine.sequence_table import SequenceTable
from turbolm.engine.speculative import num_accepted
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.engine.step_device import Download, Draws, StepDevice
from turbolm.types import Sequence

_MAX_READ = 1 << 16  # tokens of context, by all rows together, in a small step: each row reads its own anew


class Followers(Protocol):
    """The other ranks of a model: they do what they are told, as this process does it too."""

    def step(
        self,
        arrays: StepArrays,
        draws: Draws | None,
        gathers: bool,
        pools: list[RowRange] | None,
        adjustments: HostAdjustments | None,
    ) -> None:
        """`StepDevice.compute`."""

    def warm_up(self) -> None:
        """`StepDevice.warm_up`."""

    def check(self, seconds: float) -> None:
        """Raises EngineError if one of them was lost. `seconds`: how long a step has been waited for."""

    def watching(self) -> AbstractContextManager[None]:
        """Around work together with them: an error that the loss of one explains becomes an EngineError."""

    def close(self) -> None: ...


class DeviceRunner:
    """A `StepRunner` for a GPU (or, without graphs, for tests, any device). Used by one thread."""

    depth = 2

    def __init__(
        self,
        device: StepDevice,
        limits: Limits,
        block_size: int,
        vocab_size: int,
        followers: Followers | None = None,
    ) -> None:
        """`vocab_size`: tokens that may be chosen."""
        self._device = device
        self._followers = followers
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._sampler = Sampler()
        self._pooler = Pooler()
        self._table = SequenceTable(2 * limits.max_batch_size, num_columns(limits.max_context, block_size))
        self._adjuster = None if device.num_slots == 0 else Adjuster(device.num_slots)
        self._counting = np.arange(max(limits.max_batch_size, MAX_SHARED_ROWS) + 1, dtype=np.int32)
        self._last_rows: dict[Sequence, int] = {}
        self._last_tokens: Ints | None = None  # of the last step that sampled, where the host knows them
        self._last_flight: _InFlight | None = None  # that step, where it does not

    @property
    def num_replays(self) -> int:
        return self._device.num_replays

    def warm_up(self) -> bool:
        """Prepare a part of what makes steps faster; False: there is nothing left to prepare."""
        if self._followers is None:
            return self._device.warm_up()
        with self._followers.watching():
            self._followers.warm_up()
            return self._device.warm_up()

    def close(self) -> None:
        """Let go of other processes, if there are any. Idempotent."""
        if self._followers is not None:
            self._followers.close()

    def submit(self, step: Step) -> Completed | _Pooled | _InFlight:
        """Start computing a step. Steps are computed in the order in which they are submitted."""
        with nullcontext() if self._followers is None else self._followers.watching():
            return self._submit(step)

    @torch.inference_mode()
    def _submit(self, step: Step) -> Completed | _Pooled | _InFlight:
        items = step.items
        rows = self._table.rows(items)
        chooses = self._can_choose(items, rows)
        if not chooses:
            self._learn_tokens(items)
        samples = [item.samples for item in items]
        pools = None if all(samples) else pooled_rows(items)
        arrays = None if pools else self._lay_out_rows(items, rows, samples)
        if arrays is None:
            arrays = lay_out(step, self._block_size, [logit_rows_of(item) for item in items], self._last_rows)
        arrays = self._resolve(arrays)
        draws = self._draws(items, rows, samples) if chooses and any(samples) else None
        adjustments = None if draws is None else self._adjustments(items, rows)
        gathers = not chooses and len(arrays.logit_rows) > 0
        if self._followers is not None:
            self._followers.step(arrays, draws, gathers, pools, adjustments)
        computed = self._device.compute(arrays, draws, gathers, pools, adjustments)
        if chooses:
            flight = _InFlight(items, computed.download(), self._followers, self._pooler)
            if draws is not None:
                self._remember(None, items)
                self._last_flight = flight
            return flight
        followed = {item.sequence: self._followed(item.sequence) for item in items if item.follows}
        results, tokens = compute_results(computed.logits, items, self._sampler, self._vocab_size, followed)
        self._remember(np.array(tokens, np.int32), items)
        if computed.sums is not None:
            return _Pooled(items, results, computed.sums.cpu(), self._pooler)
        return Completed(results)

    def _can_choose(self, items: tuple[ScheduledSequence, ...], rows: Ints) -> bool:
        """Whether the device chooses the step's tokens."""
        table, adjuster = self._table, self._adjuster
        if not table.is_alone[rows].all():
            return False
        adjusted = table.is_adjusted[rows]
        if not adjusted.any():
            return True
        if adjuster is None:
            return False
        return all(adjuster.take(items[i].sequence) for i in adjusted.nonzero()[0].tolist() if items[i].samples)

    def _learn_tokens(self, items: tuple[ScheduledSequence, ...]) -> None:
        """Waits for the tokens that the items follow, if need be: the host is to choose what comes after them."""
        if self._last_flight is not None and any(item.follows for item in items):
            self._last_tokens = np.array(self._last_flight.tokens(), np.int32)
            self._last_flight = None

    def _followed(self, sequence: Sequence) -> int:
        """The token that the last step sampled for a sequence, where the host knows it."""
        assert self._last_tokens is not None
        return max(0, int(self._last_tokens[self._last_rows[sequence]]))

    def _lay_out_rows(self, items: tuple[ScheduledSequence, ...], rows: Ints, samples: list[bool]) -> StepArrays | None:
        """The step with a row for each token, prompts' and drafts' too, as if they were decodes: so a graph can serve
        it. None: it has tokens of prompts, and none does."""
        is_decodes = all(samples) and all(item.num_new_tokens == 1 for item in items)
        counts = [item.num_tokens for item in items]
        if is_decodes:
            return self._lay_out_decodes(items, rows, counts)
        read = sum(count * (item.start + count) for item, count in zip(items, counts, strict=True))
        if sum(counts) > MAX_SHARED_ROWS or read > _MAX_READ:
            return None
        starts = itertools.accumulate(counts, initial=0)
        wanted = [start + row for start, item in zip(starts, items, strict=False) for row in logit_rows_of(item)]
        arrays = self._lay_out_decodes(items, rows, counts)._replace(logit_rows=np.array(wanted, np.int32))
        return arrays if self._device.has_graph(arrays) else None

    def _lay_out_decodes(self, items: tuple[ScheduledSequence, ...], rows: Ints, counts: list[int]) -> StepArrays:
        """A row for each token. counts: of the items' tokens."""
        size, last_rows = self._block_size, self._last_rows
        positions = np.array([item.start for item in items], np.int32)
        shares_context = max(counts) > 1
        token_ids = [
            -1 - last_rows[item.sequence] if item.follows else item.sequence.token_ids[item.start] for item in items
        ]
        if shares_context:
            token_ids = [t for first, item in zip(token_ids, items, strict=True) for t in (first, *_further(item))]
            positions, rows = np.repeat(positions, counts) + _steps(counts), np.repeat(rows, counts)
        count = len(positions)
        contexts = positions + 1
        longest = int(contexts.max())
        tables = self._table.block_tables[rows, : num_columns(longest, size)]
        counting = self._counting[: count + 1]
        slots = tables[counting[:-1], positions // size] * size + positions % size
        return StepArrays(
            np.array(token_ids, np.int32),
            positions,
            slots,
            counting,
            contexts,
            tables,
            counting[:-1],
            1,
            longest,
            count,
            (),
            adapters_of(items),
            shares_context,
        )

    def _resolve(self, arrays: StepArrays) -> StepArrays:
        """Replaces ids below 0 by the tokens that the host chose; what the device chose is resolved there."""
        ids, last = arrays.token_ids, self._last_tokens
        if last is None or ids.min() >= 0:
            return arrays
        follows = ids < 0
        chosen = last[np.where(follows, -1 - ids, 0)]
        return arrays._replace(token_ids=np.where(follows, np.maximum(chosen, 0), ids).astype(np.int32))

    def _draws(self, items: tuple[ScheduledSequence, ...], rows: Ints, samples: list[bool]) -> Draws:
        """Of the rows of items that sample."""
        ends = np.array([item.start + item.num_new_tokens for item in items], np.int32)
        counts = [1 + len(item.drafts) if item.samples else 0 for item in items]
        if max(counts) > 1:
            rows, ends = np.repeat(rows, counts), np.repeat(ends, counts) + _steps(counts)
        elif not all(samples):
            rows, ends = rows[samples], ends[samples]
        table = self._table
        return Draws(
            uniform(table.key[rows], (ends - table.num_prompt[rows]).astype(np.int64)),
            table.temperature[rows],
            table.top_p[rows],
            table.min_p[rows],
            table.top_k[rows],
            bool(table.has_filters[rows].any()),
        )

    def _adjustments(self, items: tuple[ScheduledSequence, ...], rows: Ints) -> HostAdjustments | None:
        """Of the rows from which tokens are chosen; None: there is nothing to change."""
        adjusted = self._table.is_adjusted[rows]
        if self._adjuster is None or not adjusted.any():
            return None
        found: list[Row | None] = []
        for item, is_adjusted in zip(items, adjusted.tolist(), strict=True):
            count, end = 1 + len(item.drafts), item.start + item.num_new_tokens
            if item.samples and not is_adjusted:
                found += [None] * count
            elif item.samples and item.follows:
                is_known = self._last_tokens is not None
                last = self._followed(item.sequence) if is_known else -1 - self._last_rows[item.sequence]
                found.append(Row(item.sequence, end, (), last))
            elif item.samples:
                found += [Row(item.sequence, end + i, item.drafts[:i]) for i in range(count)]
        return self._adjuster.adjust(found)

    def _remember(self, tokens: Ints | None, items: tuple[ScheduledSequence, ...]) -> None:
        """Where each sampled token is, for the step that follows it. None: on the device."""
        self._last_tokens = tokens
        self._last_flight = None
        self._last_rows = {}
        row = 0
        for item in items:
            if item.samples:
                self._last_rows[item.sequence] = row
                row += 1 + len(item.drafts)


def _further(item: ScheduledSequence) -> tuple[int, ...]:
    """Its tokens but for the first."""
    return (*item.sequence.token_ids[item.start + 1 : item.start + item.num_new_tokens], *item.drafts)


def _steps(counts: list[int]) -> Ints:
    """0, 1, … of each count, one after the other."""
    ends = np.cumsum(np.array(counts, np.int32), dtype=np.int32)
    return np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - np.array(counts, np.int32), counts)


class _Pooled(NamedTuple):
    """A step that is computed, with chunks of prompts whose earlier ones may be in flight."""

    items: tuple[ScheduledSequence, ...]
    step_results: list[StepResult]
    sums: Tensor
    pooler: Pooler

    def results(self) -> list[StepResult]:
        return with_embeddings(self.step_results, self.pooler.embeddings(self.items, self.sums))


class _InFlight:
    """A step that the device is computing."""

    def __init__(
        self,
        items: tuple[ScheduledSequence, ...],
        download: Download,
        followers: Followers | None,
        pooler: Pooler,
    ) -> None:
        self._items = items
        self._download = download
        self._followers = followers
        self._pooler = pooler

    def tokens(self) -> list[int]:
        """What was chosen at each row; waits for it."""
        return self._download.wait(None if self._followers is None else self._followers.check)

    def results(self) -> list[StepResult]:
        rows = iter(self.tokens())
        results = [_result(item, rows) if item.samples else StepResult() for item in self._items]
        sums = self._download.sums
        return results if sums is None else with_embeddings(results, self._pooler.embeddings(self._items, sums))


def _result(item: ScheduledSequence, rows: Iterator[int]) -> StepResult:
    """Of an item that samples, from the tokens at its rows, which are taken off."""
    tokens: tuple[int, ...] = (next(rows),)
    if item.drafts:
        chosen = (*tokens, *itertools.islice(rows, len(item.drafts)))
        tokens = chosen[: num_accepted(item.drafts, chosen) + 1]
    return StepResult(tokens) if tokens[-1] >= 0 else StepResult(error=no_distribution())
