"""Runs steps on a GPU without waiting for them: the host prepares the next step while the device computes.

The host reads what a step samples one step late. Only where a request asks for what the host has to compute
(penalties, bans, log-probabilities) is a step's result awaited at once. Where several processes compute the
model together, this is the one that leads: the others get each step as the arrays that it computes itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch

from turbolm.engine.batch import Ints, StepArrays, lay_out, num_columns
from turbolm.engine.graph import Limits
from turbolm.engine.randomness import uniform
from turbolm.engine.runner import Completed, compute_results, logit_rows_of
from turbolm.engine.sampler import Sampler, no_distribution
from turbolm.engine.sequence_table import SequenceTable
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.engine.step_device import Download, Draws, StepDevice
from turbolm.types import Sequence


class Followers(Protocol):
    """The other ranks of a model: they do what they are told, as this process does it too."""

    def step(self, arrays: StepArrays, draws: Draws | None, gathers: bool) -> None:
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
        self._table = SequenceTable(2 * limits.max_batch_size, num_columns(limits.max_context, block_size))
        self._counting = np.arange(limits.max_batch_size + 1, dtype=np.int32)
        self._last_rows: dict[Sequence, int] = {}
        self._last_tokens: Ints | None = None  # of the last step that sampled, where the host chose them

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

    def submit(self, step: Step) -> Completed | _InFlight:
        """Start computing a step. Steps are computed in the order in which they are submitted."""
        with nullcontext() if self._followers is None else self._followers.watching():
            return self._submit(step)

    @torch.inference_mode()
    def _submit(self, step: Step) -> Completed | _InFlight:
        items = step.items
        rows = self._table.rows(items)
        is_plain = bool(self._table.is_plain[rows].all())
        samples = [item.samples for item in items]
        if is_plain and step.num_tokens == len(items) and all(samples):
            arrays = self._lay_out_decodes(items, rows)
        else:
            arrays = lay_out(step, self._block_size, [logit_rows_of(item) for item in items], self._last_rows)
        arrays = self._resolve(arrays)
        draws = self._draws(rows, arrays.context_lens, samples) if is_plain and any(samples) else None
        gathers = not is_plain and len(arrays.logit_rows) > 0
        if self._followers is not None:
            self._followers.step(arrays, draws, gathers)
        computed = self._device.compute(arrays, draws, gathers)
        if is_plain:
            if draws is not None:
                self._remember(None, items)
            return _InFlight(items, computed.download(), self._followers)
        results, tokens = compute_results(computed.logits, items, self._sampler, self._vocab_size)
        self._remember(np.array(tokens, np.int32), items)
        return Completed(results)

    def _lay_out_decodes(self, items: tuple[ScheduledSequence, ...], rows: Ints) -> StepArrays:
        """`lay_out` of a step in which each sequence computes one token."""
        size, count, last_rows = self._block_size, len(items), self._last_rows
        positions = np.array([item.start for item in items], np.int32)
        token_ids = [
            -1 - last_rows[item.sequence] if item.follows else item.sequence.token_ids[item.start] for item in items
        ]
        contexts = positions + 1
        longest = int(contexts.max())
        tables = self._table.block_tables[rows, : num_columns(longest, size)]
        counting = self._counting[: count + 1]
        slots = tables[counting[:-1], positions // size] * size + positions % size
        token_array = np.array(token_ids, np.int32)
        return StepArrays(
            token_array, positions, slots, counting, contexts, tables, counting[:-1], 1, longest, count, ()
        )

    def _resolve(self, arrays: StepArrays) -> StepArrays:
        """Replaces ids below 0 by the tokens that the host chose; what the device chose is resolved there."""
        ids, last = arrays.token_ids, self._last_tokens
        if last is None or ids.min() >= 0:
            return arrays
        follows = ids < 0
        chosen = last[np.where(follows, -1 - ids, 0)]
        return arrays._replace(token_ids=np.where(follows, np.maximum(chosen, 0), ids).astype(np.int32))

    def _draws(self, rows: Ints, ends: Ints, samples: list[bool]) -> Draws:
        """Of the items that sample. `ends`: positions of the tokens to choose, in their sequences."""
        if not all(samples):
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

    def _remember(self, tokens: Ints | None, items: tuple[ScheduledSequence, ...]) -> None:
        """Where each sampled token is, for the step that follows it. None: on the device."""
        self._last_tokens = tokens
        sampling = [item.sequence for item in items if item.samples]
        self._last_rows = dict(zip(sampling, range(len(sampling)), strict=True))


class _InFlight:
    """A step that the device is computing."""

    def __init__(self, items: tuple[ScheduledSequence, ...], download: Download, followers: Followers | None) -> None:
        self._items = items
        self._download = download
        self._followers = followers

    def results(self) -> list[StepResult]:
        tokens = iter(self._download.wait(None if self._followers is None else self._followers.check))
        return [_result(next(tokens)) if item.samples else StepResult() for item in self._items]


def _result(token: int) -> StepResult:
    return StepResult((token,)) if token >= 0 else StepResult(error=no_distribution())
