"""The scheduler under anything in any order: every answer is right, every limit is kept."""

from __future__ import annotations

from collections import defaultdict

import hypothesis.strategies as st
from fake_model import EOS, STOP, Model, Oracle, alone
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from turbolm.engine.scheduler import Scheduler
from turbolm.errors import CapacityError, ContextOverflowError, EngineError
from turbolm.types import Grammar, LoadedAdapter, Output, Request, SamplingParams

prompts = st.builds(
    lambda common, length, tail: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9][:length] if common else tail,
    st.booleans(),
    st.integers(1, 10),
    st.lists(st.integers(0, 1), min_size=1, max_size=10),
) | st.lists(st.integers(0, 1), min_size=1, max_size=14)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations and failures over tiny pools, up to three steps in flight."""

    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        max_batch_size=st.integers(1, 5),
        more_tokens=st.integers(0, 8),
        more_rows=st.none() | st.integers(0, 3),
        max_context=st.integers(6, 24),
        prefix_cache=st.booleans() | st.just(True),
        drafts=st.sampled_from([False, True, True]),
        random=st.randoms(use_true_random=False),
        depth=st.integers(1, 3),
    )
    def start(self, more_tokens, more_rows, drafts, random, depth, **options):
        self.scheduler = Scheduler(
            max_batch_tokens=options["max_batch_size"] + more_tokens,
            max_waiting=12,
            max_logit_rows=None if more_rows is None else options["max_batch_size"] + more_rows,
            drafter=(lambda token_ids: Oracle(token_ids, random)) if drafts else None,
            **options,
        )
        self.options = options
        self.model = Model(self.scheduler)
        self.depth = depth  # steps that may be in flight
        self.steps = []
        self.alive = {}  # (id, index) → request
        self.whole = set()  # those that come in one output
        self.deltas = defaultdict(list)
        self.num_added = 0

    @rule(
        prompt=prompts,
        max_tokens=st.none() | st.integers(0, 10),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        include_stop=st.booleans(),
        want_logprobs=st.booleans(),
        want_prompt_logprobs=st.sampled_from([False, False, True]),
        reads_answer=st.sampled_from([False, False, True]),
        deltas=st.booleans(),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        tenant=st.sampled_from(["", "", "other"]),
        loaded_adapter=st.sampled_from([None, None, LoadedAdapter("x", 1, 0)]),
        num_answers=st.sampled_from([1, 1, 3]),
    )
    def add(
        self, prompt, max_tokens, min_tokens, want_logprobs, want_prompt_logprobs, reads_answer, deltas, num_answers,
        **options,
    ):  # fmt: skip
        params = SamplingParams(
            max_tokens=max_tokens if want_prompt_logprobs else max_tokens or None,
            min_tokens=0 if reads_answer else min(min_tokens, max_tokens or 0),
            ignore_eos=options.pop("ignore_eos") and not reads_answer,
            include_stop=options.pop("include_stop"),
            stop_token_ids=(STOP,),
            logprobs=0 if want_logprobs else None,
            prompt_logprobs=0 if want_prompt_logprobs else None,
            grammar=Grammar("json") if reads_answer else None,
        )
        self.num_added += 1
        for index in range(num_answers):
            request = Request(str(self.num_added), tuple(prompt), params, index=index, eos_token_ids=(EOS,), **options)
            longest = self.options["max_context"]
            if params.max_tokens is not None:
                longest = min(longest, len(prompt) + params.max_tokens)
            capacity = self.options["num_blocks"] * self.options["block_size"]
            full = self.scheduler.num_waiting >= 12
            try:
                self.model.add(request, deltas=deltas)
            except ContextOverflowError:
                assert len(prompt) + (params.max_tokens != 0) > self.options["max_context"]
            except CapacityError:
                assert full or max(len(prompt), longest - 1) > capacity
            else:
                assert not full and max(len(prompt), longest - 1) <= capacity
                self.alive[request.id, index] = request
                if not deltas:
                    self.whole.add((request.id, index))

    def take(self, outputs):
        for output in outputs:
            key = (output.request_id, output.index)
            assert key in self.alive, "output after the last one"
            assert output.is_final or key not in self.whole
            self.deltas[key].append(output)
            if output.is_final:
                self.check(self.alive.pop(key), Output.collect(self.deltas.pop(key)))

    def check(self, request, output):
        tokens, reason, stop, num_tokens = alone(request, self.options["max_context"])
        ended_early = output.finish_reason in ("cancelled", "error") or output.stop == "END"
        assert output.usage.prompt_tokens == len(request.prompt_token_ids)
        if ended_early:
            assert output.token_ids == tokens[: len(output.token_ids)]
            assert output.usage.completion_tokens == len(output.token_ids)
        else:
            assert (output.token_ids, output.finish_reason, output.stop) == (tokens, reason, stop)
            assert output.usage.completion_tokens == num_tokens
        if request.params.logprobs is not None:
            assert tuple(entry.token_id for entry in output.logprobs) == output.token_ids
        if request.params.prompt_logprobs is not None:
            entries = [entry and entry.token_id for entry in output.prompt_logprobs]
            expected = [None, *request.prompt_token_ids[1:]]
            assert entries == (expected[: len(entries)] if ended_early else expected)

    @staticmethod
    def num_logit_rows(item):
        num_prompt_rows = 0
        if item.sequence.request.params.prompt_logprobs is not None:
            num_prompt_rows = max(0, min(item.num_new_tokens, item.sequence.num_prompt - 1 - item.start))
        return num_prompt_rows + item.samples + len(item.drafts)

    def longest(self, sequence):
        """Tokens of prompt and longest answer."""
        max_tokens, max_context = sequence.request.params.max_tokens, self.options["max_context"]
        return max_context if max_tokens is None else min(max_context, sequence.num_prompt + max_tokens)

    @precondition(lambda self: len(self.steps) < self.depth)
    @rule(breaks=st.sampled_from([False] * 7 + [True]), soon=st.booleans())
    def dispatch(self, breaks=False, soon=False):
        """`soon`: the device computes at once; else when it's asked for the results."""
        step = self.scheduler.next_batch()
        if step is None:
            assert self.steps or not self.alive, "idle with work to do"
            return
        self.check_step(step)
        if breaks:  # when it's submitted: those before it have their results
            while self.steps:
                self.complete()
            self.take(self.scheduler.fail(EngineError("broken"), step))
            return
        pending = self.model.submit(step)
        self.steps.append((step, pending))
        if soon:
            pending.results()

    def check_step(self, step):
        sequences = [item.sequence for item in step.items]
        assert len(set(map(id, sequences))) == len(sequences) <= self.options["max_batch_size"]
        assert sum(map(self.num_logit_rows, step.items)) <= self.scheduler.max_logit_rows
        assert step.num_tokens == sum(item.num_tokens for item in step.items) <= self.scheduler.max_batch_tokens
        sampled = {item.sequence for item in self.steps[-1][0].items if item.samples} if self.steps else set()
        for item in step.items:
            request = item.sequence.request
            assert item.num_new_tokens > 0
            end = item.start + item.num_tokens
            assert len(item.sequence.blocks) * self.options["block_size"] >= end
            assert not item.drafts or (item.samples and item.num_new_tokens == 1 and end < self.longest(item.sequence))
            if item.follows:
                assert item.sequence in sampled and item.samples and item.num_tokens == 1
                assert item.start == len(item.sequence.token_ids) < self.longest(item.sequence) - 1
                assert request.params.grammar is None
            else:
                assert item.start + item.num_new_tokens <= len(item.sequence.token_ids)

    @precondition(lambda self: self.steps)
    @rule(breaks=st.sampled_from([False, False, False, True]))
    def complete(self, breaks=False):
        step, pending = self.steps.pop(0)
        in_flight = [item.sequence for later, _ in self.steps for item in later.items]
        num_preemptions = [sequence.num_preemptions for sequence in in_flight]
        if breaks:
            pending.lose()
            self.take(self.scheduler.fail(EngineError("broken"), step))
        else:
            self.take(self.scheduler.update(step, pending.results()))
        assert [sequence.num_preemptions for sequence in in_flight] == num_preemptions

    @rule(count=st.integers(1, 8))
    def go_on(self, count):
        for _ in range(count):
            if len(self.steps) < self.depth:
                self.dispatch()
            if self.steps:
                self.complete()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), stop=st.booleans())
    def end_one(self, data, stop):
        key = data.draw(st.sampled_from(sorted(self.alive)))
        self.take([self.scheduler.finish(*key, "stop", "END") if stop else self.scheduler.cancel(*key)])

    @invariant()
    def blocks_add_up(self):
        if not hasattr(self, "scheduler"):
            return
        stats = self.scheduler.stats
        for step, pending in self.steps:  # what the device may still write to stays where it is
            for item, (blocks, _) in zip(step.items, pending.seen, strict=True):
                assert item.sequence.blocks[: len(blocks)] == blocks
        held = {block for sequence in self.model.sequences for block in sequence.blocks}
        assert stats.num_used_blocks == len(held) <= stats.num_blocks
        assert 0 <= stats.num_accepted_tokens <= stats.num_draft_tokens
        assert self.scheduler.num_running <= self.options["max_batch_size"]
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.alive)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            while len(self.steps) < self.depth and self.scheduler.has_work:
                before = len(self.steps)
                self.dispatch()
                if len(self.steps) == before:
                    break
            if not self.steps:
                break
            self.complete()
            self.blocks_add_up()
        assert not self.alive and not self.scheduler.has_work and not self.deltas
        assert self.scheduler.stats.num_used_blocks == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
