"""Speculative decoding, and its drafts by prompt lookup: a text that repeats itself says what may come next.

Where the last tokens of a sequence occurred in it before, those that followed then are drafts of
those that follow now. The next step computes them along with the last token; each row of its logits
chooses a token as it would without drafts, and drafts count as far as they equal what was chosen.
So the answer is the same with and without drafts, drawn tokens included: a row's choice depends on
its logits, its request and what comes before it alone (engine/sampler.py), and with the CPU's native kernels,
or in the deterministic mode, its logits don't depend, in any bit, on which rows are computed together. (Other
kernels of GPUs round by the number of rows, with drafts and without.)

A draft is worth its row where it's likely enough to be right. Each sequence keeps an estimate of
that, learned from all guesses, also from those that were not worth drafting: these cost nothing to
check, so a sequence that begins to repeat itself is noticed without trying.

Drafts need the last token on the host. Where steps overlap, the next one has to wait for it, which is part of
what drafts cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAX_DRAFTS = 8  # per sequence and step
MAX_ROWS = 16
"""Decodes and drafts of one step: as far as the costs below were measured."""

_LENGTHS = (4, 2)  # of the last tokens that are looked up; the first that is found decides
_ACCEPTANCE = (0.6, 0.3)  # how often a draft after so long a match is right, before anything is learned
_LEARNING_RATE = 0.1
_REACH = 1 << 14  # tokens before so many are not looked up: their index would take memory (200 bytes each)


class Costs(NamedTuple):
    """What drafts add to a step's time, in times of a step of one row."""

    row: float  # a further row
    wait: float = 0.0  # not to overlap the step with the one before
    draft: float = 0.0  # a further draft of all sequences by a draft model


CPU_COSTS = Costs(0.2)
"""On two AVX-512 cores, SmolLM2-135M in 4 bits takes 1.7 to 2.0 times as long for 8 rows as for one, and 2.5 to 3.1
times for 16: 0.10 to 0.14 per row. Set higher, so that what is drafted is a gain elsewhere too."""
GPU_COSTS = Costs(0.05, wait=0.4)
"""Estimates: reading the weights is nearly all of a step of few rows, and a small model's step takes little longer than
the host takes to make the next."""


class Drafter(Protocol):
    """Guesses how one sequence goes on."""

    def propose(self, limit: int, num_decodes: int) -> tuple[int, ...]:
        """At most `limit` tokens to verify in a step with `num_decodes` sequences; often none."""

    def promises(self, num_decodes: int) -> bool:
        """Whether the token after those known is worth waiting for, as drafts are likely to follow it."""


class _Guess(NamedTuple):
    position: int  # where in the sequence it begins
    token_ids: list[int]
    source: int  # index in _LENGTHS


class PromptLookup:
    """A `Drafter`. Takes about 10 µs per step, and 1 ms per thousand tokens of the prompt once."""

    def __init__(self, token_ids: Sequence[int], costs: Costs = CPU_COSTS) -> None:
        """`token_ids`: prompt and answer. It is read later: it grows, and what it holds doesn't change."""
        self._token_ids = token_ids
        self._costs = costs
        self._num_indexed = 0
        self._following: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in _LENGTHS)
        """For each of _LENGTHS: so many tokens → the position after where they occurred last."""
        self._acceptance = list(_ACCEPTANCE)
        self._guess: _Guess | None = None  # the last one

    def propose(self, limit: int, num_decodes: int) -> tuple[int, ...]:
        self._learn()
        self._index()
        self._guess = guess = self._look_up()
        if guess is None:
            return ()
        num_drafts = min(limit, num_worth(self._acceptance[guess.source], num_decodes, self._costs))
        return tuple(guess.token_ids[:num_drafts])

    def promises(self, num_decodes: int) -> bool:
        return bool(self.propose(1, num_decodes))

    def _learn(self) -> None:
        """Compares the last guess with what came."""
        if self._guess is None:
            return
        position, guessed, source = self._guess
        came = self._token_ids[position : position + len(guessed)]
        for guess, token in zip(guessed, came, strict=False):
            self._acceptance[source] += _LEARNING_RATE * ((guess == token) - self._acceptance[source])
            if guess != token:
                break

    def _index(self) -> None:
        """Takes in tokens up to the one before the last: what follows the last isn't known."""
        end = len(self._token_ids)
        start = max(self._num_indexed, end - _REACH)
        for length, following in zip(_LENGTHS, self._following, strict=True):
            first = max(start, length)
            known = self._token_ids[first - length : end - 1]
            matches = zip(*(known[i:] for i in range(length)), strict=False)
            following.update(zip(matches, range(first, end), strict=True))
        self._num_indexed = end

    def _look_up(self) -> _Guess | None:
        """What followed the last tokens when they occurred before. Where that is less than wanted,
        it's taken to repeat."""
        token_ids = self._token_ids
        end = len(token_ids)
        for source, length in enumerate(_LENGTHS):
            position = self._following[source].get(tuple(token_ids[-length:]))
            if position is not None:
                guessed = list(token_ids[position : position + MAX_DRAFTS])
                while len(guessed) < MAX_DRAFTS:
                    guessed += guessed[: MAX_DRAFTS - len(guessed)]
                return _Guess(end, guessed, source)
        return None


def num_worth(acceptance: float, num_decodes: int, costs: Costs = CPU_COSTS) -> int:
    """How many drafts save time in a step of `num_decodes` sequences, each right with this probability
    if all before it are. A further row is worth it where the token that it may yield comes cheaper
    than those of the step without it; and all together, where they make up for what waiting costs."""
    token = (1 + costs.row * (num_decodes - 1)) / num_decodes  # the time of one, without drafts
    needed = (costs.row + costs.draft / num_decodes) / token
    if acceptance < needed or needed <= 0:
        return 0
    number = min(MAX_DRAFTS, int(math.log(needed) / math.log(min(acceptance, 0.99))))
    gain = sum(acceptance**position - needed for position in range(1, number + 1))
    return number if gain >= costs.wait / (num_decodes * token) - 1e-9 else 0


def num_accepted(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many leading drafts equal the tokens chosen in their place."""
    for number, draft in enumerate(drafts):
        if draft != chosen[number]:
            return number
    return len(drafts)
