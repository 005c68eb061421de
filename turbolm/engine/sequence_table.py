"""What the host keeps of running sequences, as arrays: a decode step of hundreds of them is then laid out
by a few gathers instead of a Python loop over their blocks and parameters."""

from __future__ import annotations

import numpy as np

from turbolm.engine.batch import Ints
from turbolm.engine.randomness import stream_key
from turbolm.engine.sampler import is_adjusted, is_chosen_alone
from turbolm.engine.step import ScheduledSequence
from turbolm.types import Sequence, SequenceState

_MAX_INT = (1 << 31) - 1


class SequenceTable:
    """One row per sequence. A row is found by the sequence, and given away once that is finished."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        """`num_columns`: most blocks of a sequence."""
        self.block_tables = np.zeros((num_rows, num_columns), np.int32)
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.key = np.zeros(num_rows, np.uint64)
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.has_filters = np.zeros(num_rows, np.bool_)  # top-k, top-p or min-p
        self.is_alone = np.zeros(num_rows, np.bool_)  # `sampler.is_chosen_alone`, and no prompt's log-probabilities
        self.is_adjusted = np.zeros(num_rows, np.bool_)  # `sampler.is_adjusted`
        self._rows: dict[Sequence, int] = {}
        self._blocks: list[list[int]] = [[] for _ in range(num_rows)]  # each row's list, as last seen …
        self._num_blocks = [0] * num_rows  # … and how much of it is in the table
        self._free = list(range(num_rows))

    def rows(self, items: tuple[ScheduledSequence, ...]) -> Ints:
        """The items' rows, brought up to date."""
        found = []
        for item in items:
            sequence = item.sequence
            row = self._rows.get(sequence)
            if row is None:
                row = self._add(sequence)
            # A sequence's list of blocks grows in place; a preempted one gets another list.
            blocks = sequence.blocks
            if len(blocks) != self._num_blocks[row] or blocks is not self._blocks[row]:
                self.block_tables[row, : len(blocks)] = blocks
                self._blocks[row], self._num_blocks[row] = blocks, len(blocks)
            found.append(row)
        return np.array(found, np.int32)

    def _add(self, sequence: Sequence) -> int:
        if not self._free:
            for other, row in list(self._rows.items()):
                if other.state is SequenceState.FINISHED:
                    del self._rows[other]
                    self._free.append(row)
        if not self._free:
            self._grow()
        row = self._rows[sequence] = self._free.pop()
        request = sequence.request
        params = request.params
        self.num_prompt[row] = sequence.num_prompt
        self.key[row] = stream_key(request)
        self.temperature[row] = params.temperature
        self.top_k[row] = min(params.top_k, _MAX_INT)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.has_filters[row] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.is_alone[row] = is_chosen_alone(request) and params.prompt_logprobs is None
        self.is_adjusted[row] = is_adjusted(request)
        self._num_blocks[row] = 0
        return row

    def _grow(self) -> None:
        """Twice the rows."""
        size = len(self._num_blocks)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, np.concatenate([value, np.zeros_like(value)]))
        self._blocks += [[] for _ in range(size)]
        self._num_blocks += [0] * size
        self._free += range(size, 2 * size)
