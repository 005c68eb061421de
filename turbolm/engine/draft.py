"""A draft model: a small one proposes tokens, which the large one then checks, several in a step.

It runs in steps of its own, over a KV cache of its own whose blocks are those of the large model's: block b holds the
same tokens in both. It draws with the same parameters and the same random numbers as the large model, so that where
both find a token likely they choose the same. What it says is never more than a guess: the text is the large model's.

A sequence's K/V are computed when the first drafts are asked for, and after that as far as they lag behind.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Sequence as Rows
from dataclasses import replace

from turbolm.engine.engine import PendingStep, StepRunner
from turbolm.engine.speculative import Costs, num_accepted, num_worth
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.types import Request, Sequence, SequenceState

_FIRST_ACCEPTANCE = 0.7  # of drafts, before anything is learned
_LEARNING_RATE = 0.1
_PROBE = 64  # tokens after which a sequence whose drafts did not pay gets some again, to learn from


class _State:
    """What is known of a sequence."""

    __slots__ = ("acceptance", "blocks", "drafts", "num_computed", "position", "request")

    def __init__(self, request: Request, acceptance: float) -> None:
        params = replace(request.params, logprobs=None, prompt_logprobs=None)
        self.request = replace(request, params=params, adapter=None)
        self.blocks: list[int] | None = None  # the list that K/V were computed in: a preempted sequence gets another
        self.num_computed = 0  # leading tokens whose K/V are there
        self.acceptance = acceptance
        self.position = 0  # of the last drafts
        self.drafts: tuple[int, ...] = ()


class DraftModel:
    """A `Proposer`. Used by the engine's thread."""

    def __init__(self, runner: StepRunner, max_batch_tokens: int, costs: Costs) -> None:
        """`runner` runs the small model's steps, of at most so many tokens."""
        self._runner = runner
        self._max_batch_tokens = max_batch_tokens
        self._costs = costs
        self._acceptance = _FIRST_ACCEPTANCE  # of new sequences, learned from all
        self._states: weakref.WeakKeyDictionary[Sequence, _State] = weakref.WeakKeyDictionary()

    def num_worth(self, sequence: Sequence, num_decodes: int) -> int:
        if sequence.request.params.grammar is not None:
            return 0  # its place in the grammar would have to be found for every guess
        state = self._state(sequence)
        self._learn(sequence, state)
        number = num_worth(state.acceptance, num_decodes, self._costs)
        # Where steps overlap, it is asked for in advance, when one token less is known.
        return number or int(len(sequence.token_ids) % _PROBE < 2)

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        shadows, counts = [], [count for _, count in wanted]
        for sequence, _ in wanted:
            state = self._state(sequence)
            self._learn(sequence, state)
            if state.blocks is not sequence.blocks:
                state.blocks, state.num_computed = sequence.blocks, 0
            shadow = Sequence(state.request)
            shadow.token_ids = list(sequence.token_ids)
            shadow.blocks = sequence.blocks
            shadow.num_computed = state.num_computed
            shadows.append(shadow)
        self._catch_up(shadows)
        proposed = self._draw(shadows, counts)
        for (sequence, _), shadow, drafts in zip(wanted, shadows, proposed, strict=True):
            state = self._states[sequence]
            state.position, state.drafts = len(sequence.token_ids), drafts
            state.num_computed = len(sequence.token_ids) + max(0, len(drafts) - 1)
            shadow.state = SequenceState.FINISHED  # what is kept for it may go
        return proposed

    def _state(self, sequence: Sequence) -> _State:
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = _State(sequence.request, self._acceptance)
        return state

    def _learn(self, sequence: Sequence, state: _State) -> None:
        """Compares the last drafts with what came."""
        drafts, position = state.drafts, state.position
        came = sequence.token_ids[position : position + len(drafts)]
        if not drafts or not came:
            return
        num_right = num_accepted(drafts[: len(came)], came)
        for is_right in [1.0] * num_right + [0.0] * (num_right < len(came)):
            state.acceptance += _LEARNING_RATE * (is_right - state.acceptance)
            self._acceptance += _LEARNING_RATE * (is_right - self._acceptance) / 4
        state.num_computed = min(state.num_computed, position + num_right)
        state.drafts = ()

    def _catch_up(self, shadows: list[Sequence]) -> None:
        """Computes K/V of all tokens but the last."""
        while True:
            lags = [(shadow, len(shadow.token_ids) - 1 - shadow.num_computed) for shadow in shadows]
            lags = [(shadow, lag) for shadow, lag in lags if lag > 0]
            if not lags:
                return
            items, room = [], self._max_batch_tokens
            if all(lag == 1 for _, lag in lags):  # as after drafts that were all right: such steps are the fastest
                items = [ScheduledSequence(shadow, shadow.num_computed, 1, True) for shadow, _ in lags]
            else:
                for shadow, lag in lags:
                    count = min(lag, room)
                    if count:
                        items.append(ScheduledSequence(shadow, shadow.num_computed, count, False))
                    room -= count
            self._submit(items).results()
            for item in items:
                item.sequence.num_computed += item.num_new_tokens

    def _draw(self, shadows: list[Sequence], counts: list[int]) -> list[tuple[int, ...]]:
        """So many tokens after each sequence's; fewer where none can be chosen."""
        drafts: list[list[int]] = [[] for _ in shadows]
        flying: collections.deque[tuple[list[int], PendingStep]] = collections.deque()
        starts = [len(shadow.token_ids) - 1 for shadow in shadows]
        depth = self._runner.depth

        def land() -> None:
            members, pending = flying.popleft()
            for member, result in zip(members, pending.results(), strict=True):
                drafts[member] += result.token_ids
                shadows[member].token_ids += result.token_ids

        for number in range(max(counts)):
            members = [
                i for i, count in enumerate(counts) if count > number and (depth > 1 or len(drafts[i]) == number)
            ]
            if not members:
                break
            follows = number > 0 and depth > 1
            items = [ScheduledSequence(shadows[i], starts[i] + number, 1, True, (), follows) for i in members]
            flying.append((members, self._submit(items)))
            if len(flying) >= depth:
                land()
        while flying:
            land()
        return [tuple(own) for own in drafts]

    def _submit(self, items: Rows[ScheduledSequence]) -> PendingStep:
        return self._runner.submit(Step(tuple(items), sum(item.num_tokens for item in items)))


class PairedRunner:
    """The large model's runner, which prepares the draft model's too."""

    def __init__(self, runner: StepRunner, draft: StepRunner) -> None:
        self.depth = runner.depth
        self._runner = runner
        self._draft = draft

    @property
    def num_replays(self) -> int:
        return self._runner.num_replays

    def submit(self, step: Step) -> PendingStep:
        return self._runner.submit(step)

    def warm_up(self) -> bool:
        return self._runner.warm_up() or self._draft.warm_up()

    def close(self) -> None:
        self._runner.close()
        self._draft.close()
