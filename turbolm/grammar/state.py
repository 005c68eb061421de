"""Where an answer stands in its grammar, and the tokens that may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]


class GrammarState:
    """One answer's. Follows it token by token; what it was told stays with it when the answer is preempted."""

    def __init__(self, matcher: Any, executor: Any) -> None:
        self.matcher = matcher
        self.executor = executor
        self._num_seen = 0

    def follow(self, answer: Sequence[int]) -> None:
        """`answer`: all its tokens so far, each of which a mask has allowed."""
        if len(answer) > self._num_seen:
            self.matcher.consume_tokens(list(answer[self._num_seen :]))
            self._num_seen = len(answer)

    @property
    def error(self) -> str | None:
        """Why it can't go on: the grammar takes too much work, say."""
        return self.matcher.get_error() if self.matcher.is_error() else None


class MaskRows(NamedTuple):
    """Rows of masks for one answer: one for its next token, and one after each of its drafts."""

    state: GrammarState
    first: int
    drafts: tuple[int, ...] = ()


def fill_masks(rows: Sequence[MaskRows], words_rw: Words) -> None:
    """Sets the bit of every token that may come (by id, from the lowest bit of a word on), and clears the others.
    End-of-text tokens may come exactly where the grammar may end. Rows after a draft that may not come are left as they
    are: what is chosen there is void. A state that runs into an error leaves nothing that may come."""
    assert words_rw.flags.c_contiguous
    shape = (words_rw.ctypes.data, 4 * words_rw.shape[1], words_rw.shape[0])
    lone = [(row.state.matcher, row.first) for row in rows if not row.drafts]
    drafting = [(row.state.matcher, row.first, list(row.drafts)) for row in rows if row.drafts]
    if lone:
        rows[0].state.executor.unsafe_compute_mask_ptr(lone, *shape)
    if drafting:
        rows[0].state.executor.unsafe_compute_mask_ptr_with_draft_token(drafting, *shape)
    for row in rows:
        if row.state.error is not None:
            words_rw[row.first] = 0
