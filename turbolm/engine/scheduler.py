"""What to compute next: continuous batching over a fixed pool of KV blocks.

A loop around it:

    step = scheduler.next_batch()        # which tokens of which sequences
    results = runner.run(step)           # K/V written, next tokens sampled
    outputs = scheduler.update(step, results)

Policy
- Order is (priority, arrival), lower first, everywhere. Priorities are strict and don't age: steady
  work of one priority holds up all work of higher numbers for as long as it lasts. Within one
  priority nobody starves: a request that can't be admitted yet holds up those behind it.
- Each step computes every running sequence's next token, and fills up to `max_batch_tokens` (`max_prompt_tokens`) with
  prompts, in chunks where they don't fit: the leftover of one prompt's last chunk goes to the next.
- Blocks are taken as a sequence grows. When none is left, the last running sequence in order is
  preempted: it loses its blocks, waits at its place, and its tokens so far are computed again later
  (those still found in the prefix cache are not). A sequence takes blocks only from those after
  it, so the first in order always advances. To keep preemption rare, a request is admitted only when
  its prompt fits along with what the running ones lack, plus a block for each to grow.
- A waiting request preempts running ones of a higher priority number when it then fits.
- A prompt whose next block is being computed by another sequence right now waits for that step and
  then shares the block.
- Decodes carry drafts (drafting.py), if there is a drafter, as far as a step and the pool have
  room left over: nothing else waits or is preempted for them.

Running ahead: `next_batch` may be called again before `update`. It then schedules what doesn't depend
on the results still due, and the tokens that the last step samples, one per sequence, which the device
knows by then (`ScheduledSequence.follows`). Where such a token ends its answer, what follows it is
dropped at its update. Steps must be run and updated in the order they were made.
- The tokens of some requests are chosen by what the answer holds, which the host has to know (grammars).
  While one of them waits for its token, so does the next step: run without it, the two
  would take turns for good, each at half the speed.
- A sequence in a step not yet updated is never preempted. Where it would be, it is held: left out of
  this step, so that it can be preempted after the update, if that is still needed. If it ends early
  (cancelled, say), its blocks return with the update: the device may still be writing to them.
- Nobody is preempted or held for a token ahead, or while blocks are about to return.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import NamedTuple

from turbolm.engine.blocks import Blocks
from turbolm.engine.drafting import Drafting, Proposer
from turbolm.engine.job import Job, OpenStep
from turbolm.engine.speculative import Drafter
from turbolm.engine.step import ScheduledSequence, SchedulerStats, Step, StepResult
from turbolm.errors import CapacityError, ConfigError, ContextOverflowError, EngineError, RequestError, TurbolmError
from turbolm.types import FinishReason, LoadedAdapter, Output, Request, Sequence, SequenceState, TokenLogprob, Usage


class _InFlight(NamedTuple):
    step: Step
    jobs: list[Job]  # of step.items
    number: int


_place = attrgetter("place")


class Scheduler:
    """Decides what each step computes, and owns all KV blocks. Not thread-safe."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_context: int,
        max_waiting: int,
        prefix_cache: bool = True,
        max_logit_rows: int | None = None,
        max_prompt_tokens: int | None = None,
        drafter: Callable[[list[int]], Drafter] | None = None,
        draft_model: Proposer | None = None,
    ) -> None:
        """`max_batch_size` sequences run at once; a step has at most `max_batch_tokens` tokens, of which prompts
        have at most `max_prompt_tokens`, and wants logits for at most `max_logit_rows` of them (None: no limit);
        prompt plus answer have at most `max_context`; at most `max_waiting` requests wait. `drafter` makes, of a
        sequence's token ids, what guesses how it goes on (None: no drafts); where it has none, `draft_model` may."""
        max_logit_rows = max_batch_tokens if max_logit_rows is None else max_logit_rows
        for name, value in (
            ("num_blocks", num_blocks),
            ("block_size", block_size),
            ("max_batch_size", max_batch_size),
            ("max_context", max_context),
            ("max_waiting", max_waiting),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_logit_rows", max_logit_rows)):
            if value < max_batch_size:
                raise ConfigError(
                    f"{name} is {value}, but {max_batch_size} sequences (max_batch_size) need one each per step: raise "
                    f"{name} or lower max_batch_size"
                )
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_logit_rows = max_logit_rows
        self.max_prompt_tokens = max_batch_tokens if max_prompt_tokens is None else max_prompt_tokens
        self.max_context = max_context
        self.max_waiting = max_waiting
        self._drafting = Drafting(drafter, draft_model)
        self._blocks = Blocks(num_blocks, block_size, prefix_cache)
        self._jobs: dict[tuple[str, int], Job] = {}  # all that are alive, by (request id, index)
        self._waiting: list[Job] = []  # in order, as is
        self._running: list[Job] = []
        self._in_flight: deque[_InFlight] = deque()
        self._held: set[Job] = set()  # running ones to be left out of the step being made
        self._num_ending = 0  # ended, but still in a step
        self._num_added = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_prefix_hit_tokens = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    # Requests come and go

    def add(self, request: Request, deltas: bool = True) -> Sequence:
        """Queues a request. With `deltas`, what each step yields comes as an output; without, its last
        output, the only one, has all. Raises CapacityError if the queue is full or the request could not
        run even alone, RequestError if its (id, index) is in use, ContextOverflowError if the prompt
        leaves no room for an answer."""
        key = (request.id, request.index)
        if key in self._jobs:
            raise RequestError(f"request '{request.id}' (answer {request.index}) is already in work: use another id")
        if len(self._waiting) >= self.max_waiting:
            raise CapacityError(
                f"{len(self._waiting)} requests are waiting, and max_waiting is {self.max_waiting}: try again later"
            )
        sequence = Sequence(request)
        drafter = self._drafting.drafter_of(sequence)
        job = Job(sequence, self._num_added, self.max_context, self.block_size, drafter, deltas)
        if sequence.num_prompt + request.has_answer > self.max_context:
            raise ContextOverflowError(
                f"the prompt has {sequence.num_prompt} tokens and the context {self.max_context}, which leaves no room"
                f"{' for an answer' * request.has_answer}: shorten the prompt or raise max_context",
                "prompt",
            )
        num_blocks, size = self._blocks.pool.num_blocks, self.block_size
        if job.max_blocks > num_blocks:
            raise CapacityError(
                f"prompt ({sequence.num_prompt} tokens) and answer (up to {job.max_length - sequence.num_prompt}) need "
                f"{job.max_blocks} KV blocks of {size} tokens, and the whole KV cache has {num_blocks} "
                f"({num_blocks * size} tokens): lower max_tokens, shorten the prompt, or raise kv_memory"
            )
        self._num_added += 1
        self._jobs[key] = job
        if not self._waiting or self._waiting[-1].priority <= job.priority:  # as hundreds in a row
            self._waiting.append(job)
        else:
            insort(self._waiting, job, key=_place)
        return sequence

    def cancel(self, request_id: str, index: int = 0) -> Output | None:
        """Ends a request; its last output, or None if there is no such request (any more)."""
        return self.finish(request_id, index, "cancelled")

    def finish(
        self,
        request_id: str,
        index: int,
        reason: FinishReason,
        stop: str | None = None,
        error: TurbolmError | None = None,
    ) -> Output | None:
        """Ends a request for a reason that the scheduler can't see, such as a stop string in its text;
        its last output, or None if there is no such request (any more)."""
        job = self._jobs.get((request_id, index))
        return None if job is None else self._end(job, reason, stop, error=error)

    def fail(self, error: TurbolmError, step: Step | None = None) -> list[Output]:
        """Ends with `error` the sequences of a step that broke, in place of its `update`; without a
        step, every request. Returns the last outputs."""
        jobs = list(self._jobs.values())
        if step is not None:
            jobs = self._close_step(step)
            for job in jobs:
                if job.sequence.finish_reason is not None:
                    self._drop(job)
        return [self._end(job, "error", error=error) for job in jobs if job.sequence.finish_reason is None]

    def uses(self, adapter: LoadedAdapter) -> bool:
        """Whether any request that is waiting or running has it."""
        return any(job.sequence.request.loaded_adapter == adapter for job in self._jobs.values())

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running. While so and all steps are updated, `next_batch`
        has something to do."""
        return bool(self._jobs)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_blocks=self._blocks.pool.num_blocks,
            num_used_blocks=self._blocks.pool.num_owned,
            num_idle_blocks=self._blocks.pool.num_idle,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
        )

    # Before a step

    def next_batch(self) -> Step | None:
        """What to compute next; None if there is nothing to do before another `update` or `add`."""
        if self._in_flight and (
            any(job.reads_answer and not job.num_left for job in self._running)
            or self._drafting.awaits(self._running, self._in_flight[-1].step)
        ):
            return None
        self._held.clear()
        self._make_way()
        open_step = self._continue_running()
        self._admit(open_step)
        self._num_draft_tokens += self._drafting.add(open_step, self._spare_slots)
        finished = open_step.finish()
        if finished is None:
            return None
        step, jobs = finished
        self._in_flight.append(_InFlight(step, jobs, self._num_steps))
        self._num_steps += 1
        return step

    def _continue_running(self) -> OpenStep:
        """Schedules running sequences, and waiting ones that have priority over running prompts."""
        size, held, last = self.block_size, self._held, self._num_steps - 1
        num_decodes = 0
        for job in self._running:
            num_left = len(job.sequence.token_ids) - job.num_scheduled
            if num_left == 1 or (num_left == 0 and job.sampled_by == last):
                num_decodes += 1
        open_step = OpenStep(self._prompt_room(num_decodes), self.max_logit_rows - num_decodes)
        for job in tuple(self._running):
            sequence, start = job.sequence, job.num_scheduled
            blocks = sequence.blocks
            if not blocks or (held and job in held):  # preempted a moment ago, or to be so
                continue
            num_left = len(sequence.token_ids) - start
            if num_left > 1:
                self._admit(open_step, before=job.priority)
                num_new = open_step.room(job)
                if num_new > 0 and self._grow(job, start + num_new):
                    open_step.add_prompt(self._schedule(job, num_new), job)
            elif num_left == 1 or (num_left == 0 and job.sampled_by == last):
                grow = self._grow if num_left else self._blocks.grow  # nobody gives way to a token ahead
                if start < len(blocks) * size or grow(job, start + 1):
                    open_step.add_decode(self._schedule(job, 1), job)
        return open_step

    def _prompt_room(self, num_decodes: int) -> int:
        """Tokens of prompts, beside so many decodes."""
        return min(self.max_prompt_tokens, self.max_batch_tokens - num_decodes)

    def _admit(self, open_step: OpenStep, before: float = math.inf) -> None:
        """Starts waiting sequences of priorities below `before`, as far as tokens, places and blocks allow."""
        deferred: list[Job] = []
        num_seen = 0
        reserve: int | None = None
        for job in self._waiting:
            if job.priority >= before or len(self._running) + len(deferred) >= self.max_batch_size:
                break
            if open_step.num_tokens < 1 or open_step.num_logit_rows < 1:
                break
            hits = self._blocks.match(job)
            if self._blocks.awaits(job, len(hits)):
                deferred.append(job)
                num_seen += 1
                continue
            if reserve is None:
                reserve = self._reserve()
            if self._blocks.num_missing(job, hits, reserve) > 0:
                break
            num_seen += 1
            self._start(job, hits)
            num_new = open_step.room(job)
            self._blocks.grow(job, job.num_scheduled + num_new)
            open_step.add_prompt(self._schedule(job, num_new), job)
            reserve += job.num_wanted
        if num_seen:
            self._waiting[:num_seen] = deferred

    def _spare_slots(self, job: Job, wanted: int) -> int:
        """Slots for up to so many drafts: in the job's last block, and in new ones that nobody waits
        for or will lack."""
        blocks, size = job.sequence.blocks, self.block_size
        num_missing = -(-(job.num_scheduled + wanted) // size) - len(blocks)
        if num_missing > 0 and not self._waiting:
            num_spare = self._blocks.pool.num_available - self._reserve() + job.num_wanted
            self._blocks.grow(job, (len(blocks) + max(0, min(num_missing, num_spare))) * size)
        return min(wanted, len(blocks) * size - job.num_scheduled)

    def _make_way(self) -> None:
        """Preempts running sequences for the first waiting one, if it has priority over them and fits then."""
        if not self._waiting or not self._running or self._waiting[0].priority >= self._running[-1].priority:
            return
        first, blocks = self._waiting[0], self._blocks
        victims = [job for job in reversed(self._running) if job.priority > first.priority]
        num_missing = blocks.num_missing(first, blocks.match(first), self._reserve())
        if num_missing > sum([blocks.gain(job) for job in victims]) or (num_missing > 0 and self._num_ending):
            return
        held_gain = 0
        for job in victims:
            if num_missing <= held_gain and len(self._running) - len(self._held) < self.max_batch_size:
                break
            if job.num_in_flight:
                self._held.add(job)
                held_gain += blocks.gain(job)
            else:
                self._preempt(job)
                num_missing = blocks.num_missing(first, blocks.match(first), self._reserve())

    def _reserve(self) -> int:
        """Blocks not to be given to new sequences: what the running ones lack, and one for each to grow."""
        return sum([job.num_wanted for job in self._running])

    def _start(self, job: Job, hits: list[int]) -> None:
        sequence = job.sequence
        self._blocks.start(job, hits)
        sequence.state = SequenceState.RUNNING
        insort(self._running, job, key=_place)
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
            sequence.queued = time.monotonic() - sequence.arrival
            self._num_prompt_tokens += sequence.num_prompt
            self._num_prefix_hit_tokens += sequence.num_cached

    def _grow(self, job: Job, num_tokens: int) -> bool:
        """Takes the blocks for so many leading tokens, if need be from running sequences that come
        later; False if that isn't possible now."""
        while not self._blocks.grow(job, num_tokens):
            last = self._running[-1]
            if last is job or self._num_ending:
                return False
            if last.num_in_flight:
                self._held.add(last)
                return False
            self._preempt(last)
        return True

    def _preempt(self, job: Job) -> None:
        sequence = job.sequence
        self._blocks.release(job)
        sequence.num_computed = job.num_scheduled = 0
        sequence.num_preemptions += 1
        sequence.state = SequenceState.WAITING
        _remove(self._running, job)
        insort(self._waiting, job, key=_place)
        self._num_preemptions += 1

    def _schedule(self, job: Job, num_new: int) -> ScheduledSequence:
        """The next so many tokens; where none is left, the one that is being sampled."""
        sequence, start, num_known = job.sequence, job.num_scheduled, len(job.sequence.token_ids)
        end = start + num_new
        job.num_scheduled = end
        job.num_in_flight += 1
        samples = job.has_answer and end >= num_known
        if samples and end + 1 < job.max_length:
            job.sampled_by = self._num_steps
        item = ScheduledSequence(sequence, start, num_new, samples, (), end > num_known)
        if num_new > 1:
            self._blocks.announce(job, item, self._num_steps)
        return item

    # After a step

    def update(self, step: Step, results: Collection[StepResult]) -> list[Output]:
        """Takes the results of the oldest step not yet updated, one per item; returns what there is to
        hand out, in the step's order."""
        if len(results) != len(step.items):
            raise EngineError(f"a step of {len(step.items)} sequences yielded {len(results)} results")
        for item, result in zip(step.items, results, strict=True):
            if len(result.token_ids) != item.samples and result.error is None:
                item.check(result.token_ids)
        outputs = []
        for job, item, result in zip(self._close_step(step), step.items, results, strict=True):
            if job.sequence.finish_reason is not None:  # ended while this step ran
                self._drop(job)
                continue
            output = self._end(job, "error", error=result.error) if result.error else self._extend(job, item, result)
            if output is not None:
                outputs.append(output)
        return outputs

    def _close_step(self, step: Step) -> list[Job]:
        """Takes the oldest step off those in flight; returns its items' jobs."""
        if not self._in_flight or self._in_flight[0].step is not step:
            raise EngineError("steps must be updated once each, in the order in which next_batch made them")
        flight = self._in_flight.popleft()
        for job, item in zip(flight.jobs, step.items, strict=True):
            job.num_in_flight -= 1
            if item.num_new_tokens > 1:
                self._blocks.retract(job, item, flight.number)
        return flight.jobs

    def _extend(self, job: Job, item: ScheduledSequence, result: StepResult) -> Output | None:
        """Appends the sampled tokens as far as the answer goes, and notes what is computed."""
        sequence = job.sequence
        num_taken, reason, stop = job.append(result.token_ids)
        num_computed = item.start + item.num_new_tokens
        if item.drafts:
            num_accepted = len(result.token_ids) - 1
            self._num_accepted_tokens += num_accepted
            num_computed = job.num_scheduled = min(num_computed + num_accepted, len(sequence.token_ids))
        if num_computed // self.block_size > sequence.num_computed // self.block_size:
            self._blocks.publish(job, num_computed)
        sequence.num_computed = num_computed
        if not job.has_answer and num_computed == sequence.num_prompt:
            if sequence.request.pooling is not None:
                return self._end(job, "stop", embedding=result.embedding)
            reason = "length"
        prompt_logprobs = result.prompt_logprobs and job.new_prompt_logprobs(item.start, result.prompt_logprobs)
        if reason is None:
            if not job.deltas:
                if result.logprobs or prompt_logprobs:
                    job.hold(result.logprobs, prompt_logprobs)
                return None
            if not num_taken and not prompt_logprobs:
                return None
            request = sequence.request
            return Output(request.id, request.index, result.token_ids, (), result.logprobs, prompt_logprobs)
        sequence.stop = stop
        num_shown = num_taken - (stop is not None and not sequence.request.params.include_stop)
        return self._end(job, reason, stop, result.token_ids[:num_shown], result.logprobs[:num_shown], prompt_logprobs)

    def _end(
        self,
        job: Job,
        reason: FinishReason,
        stop: int | str | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt_logprobs: tuple[TokenLogprob | None, ...] = (),
        error: TurbolmError | None = None,
        embedding: bytes | None = None,
    ) -> Output:
        """Ends a live sequence: the one place where a last output is made."""
        sequence = job.sequence
        request = sequence.request
        _remove(self._running if sequence.state is SequenceState.RUNNING else self._waiting, job)
        del self._jobs[request.id, request.index]
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        if job.num_in_flight:
            self._num_ending += 1
        else:
            self._blocks.release(job)
        if not job.deltas:
            job.hold(logprobs, prompt_logprobs)
            token_ids, logprobs, prompt_logprobs = job.answer, tuple(job.held_logprobs), tuple(job.held_prompt_logprobs)
        usage = Usage(sequence.num_prompt, sequence.num_output, sequence.num_cached, sequence.queued)
        return Output(
            request.id, request.index, token_ids, (), logprobs, prompt_logprobs, reason, stop, usage, error, embedding
        )  # fmt: skip

    def _drop(self, job: Job) -> None:
        """A step is over with a sequence that had ended before."""
        if not job.num_in_flight:
            self._blocks.release(job)
            self._num_ending -= 1


def _remove(jobs: list[Job], job: Job) -> None:
    index = bisect_left(jobs, job.place, key=_place)
    assert jobs[index] is job
    del jobs[index]
