"""Penalties, biases and bans that the device applies: which tokens it has to count, and what each row gets.

The device keeps, in a slot per sequence with penalties, how often its answer holds each token. The host says which
tokens are to be counted, most of which it does not know yet: they are what the step before samples.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from turbolm.engine.batch import Ints
from turbolm.engine.sampler import Choice, has_penalties
from turbolm.ops.adjustments import PROMPT
from turbolm.types import Sequence, SequenceState

Floats = NDArray[np.float32]

_ALWAYS = np.iinfo(np.int64).max


class HostAdjustments(NamedTuple):
    """`ops.adjustments.Adjustments` on the host, and slots that begin anew."""

    counted_slots: Ints
    counted_tokens: Ints
    counted_amounts: Ints
    slots: Ints
    drafts: Ints  # [r, d]
    repetition: Floats
    presence: Floats
    frequency: Floats
    rows: Ints
    tokens: Ints
    values: Floats
    sources: Ints
    wanted: Ints
    cleared: list[int]


class Row(NamedTuple):
    """A row of logits from which a token is chosen."""

    sequence: Sequence
    end: int  # the token's position in the sequence
    drafts: tuple[int, ...] = ()  # tokens ahead of it that may be wrong, after the known ones
    last: int | None = None  # the token ahead of it, where the sequence doesn't hold it yet; below 0: -1 - its row in
    # the step before, which samples it


class _State:
    """What the host keeps of a sequence."""

    __slots__ = ("bias_tokens", "bias_values", "entries_until", "num_counted", "slot", "stops")

    def __init__(self, sequence: Sequence) -> None:
        request, params = sequence.request, sequence.request.params
        self.slot = -1
        self.num_counted = 0  # leading tokens that the slot has
        self.bias_tokens = list(params.logit_bias)
        self.bias_values = list(params.logit_bias.values())
        self.stops = list(dict.fromkeys(Choice(sequence).stops))
        self.entries_until = sequence.num_prompt + params.min_tokens
        if request.bad_words_ids or params.logit_bias:
            self.entries_until = _ALWAYS


class Adjuster:
    """Keeps slots for the sequences that need them. Used by one thread."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))
        self._states: dict[Sequence, _State] = {}

    def take(self, sequence: Sequence) -> bool:
        """Prepare for a sequence with adjustments; False where it needs a slot and all are taken."""
        state = self._states.get(sequence)
        if state is not None:
            return True
        state = _State(sequence)
        if has_penalties(sequence.request.params):
            if not self._free:
                self._release()
            if not self._free:
                return False
            state.slot = self._free.pop()
        self._states[sequence] = state
        return True

    def _release(self) -> None:
        """The slots of sequences that are finished."""
        for sequence, state in list(self._states.items()):
            if sequence.state is SequenceState.FINISHED:
                del self._states[sequence]
                if state.slot >= 0:
                    self._free.append(state.slot)

    def adjust(self, rows: Rows[Row | None]) -> HostAdjustments:
        """For each row of logits; None: nothing is changed there. Those of a sequence follow each other, each with a
        draft more than the one before."""
        counted: list[tuple[int, int, int]] = []
        entries: list[tuple[int, int, float, int, int]] = []
        cleared: list[int] = []
        count = len(rows)
        slots = np.full(count, -1, np.int32)
        drafts = np.full((count, max((len(row.drafts) for row in rows if row is not None), default=0)), -1, np.int32)
        numbers = np.zeros((3, count), np.float32)
        for index, row in enumerate(rows):
            if row is None:
                continue
            state = self._states[row.sequence]
            if state.slot >= 0:
                params = row.sequence.request.params
                slots[index] = state.slot
                drafts[index, : len(row.drafts)] = row.drafts
                numbers[:, index] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
                if not row.drafts:
                    if not state.num_counted:
                        cleared.append(state.slot)
                    _count(state, row, counted)
            if row.end < state.entries_until:
                _add_entries(state, row, index, entries)
        columns = np.array(counted, np.int32).reshape(-1, 3).T.copy()
        places = np.array([(*e[:2], *e[3:]) for e in entries], np.int32).reshape(-1, 4).T.copy()
        values = np.array([entry[2] for entry in entries], np.float32)
        has_slots = bool((slots >= 0).any())
        return HostAdjustments(
            columns[0], columns[1], columns[2], slots if has_slots else slots[:0], drafts, numbers[0], numbers[1],
            numbers[2], places[0], places[1], values, places[2], places[3], cleared,
        )  # fmt: skip


def _count(state: _State, row: Row, counted: list[tuple[int, int, int]]) -> None:
    """What is ahead of the row's token and was not counted."""
    sequence, slot = row.sequence, state.slot
    known, num_prompt = sequence.token_ids, sequence.num_prompt
    if state.num_counted == 0:
        counted += [(slot, token, PROMPT) for token in set(known[:num_prompt])]
        state.num_counted = num_prompt
    counted += [(slot, token, 1) for token in known[state.num_counted : row.end - (row.last is not None)]]
    if row.last is not None:
        counted.append((slot, row.last, 1))
    state.num_counted = max(state.num_counted, row.end)


def _add_entries(state: _State, row: Row, index: int, entries: list[tuple[int, int, float, int, int]]) -> None:
    """Row, token, value, source and wanted token of each."""
    sequence, request = row.sequence, row.sequence.request
    entries += [(index, token, value, -1, 0) for token, value in zip(state.bias_tokens, state.bias_values, strict=True)]
    if row.end < sequence.num_prompt + request.params.min_tokens:
        entries += [(index, token, -np.inf, -1, 0) for token in state.stops]
    if not request.bad_words_ids:
        return
    longest = max(map(len, request.bad_words_ids))
    ahead = row.drafts if row.last is None or row.last < 0 else (row.last,)
    num_known = row.end - len(row.drafts) - (row.last is not None)
    answer = [*sequence.token_ids[max(sequence.num_prompt, num_known - longest) : num_known], *ahead]
    for *before, last in request.bad_words_ids:
        source, wanted = -1, 0
        if before and row.last is not None and row.last < 0:
            source, wanted = -1 - row.last, before.pop()
        if len(before) <= len(answer) and answer[len(answer) - len(before) :] == before:
            entries.append((index, last, -np.inf, source, wanted))
