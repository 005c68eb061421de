"""The scheduler (with job.py and step.py), and a model of a few lines that reads its past through
simulated KV blocks.

What the model computes at a position depends on everything in the slots before it, so a block that
is shared wrongly, overwritten or freed too early changes an answer.
"""

from __future__ import annotations

import zlib
from collections import defaultdict

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import StepResult
from turbolm.errors import CapacityError, ConfigError, ContextOverflowError, EngineError, RequestError
from turbolm.types import Output, Request, SamplingParams, SequenceState, TokenLogprob, Usage

VOCABULARY = 12
EOS = 7
STOP = 8


def namespace(request):
    return zlib.crc32(repr((request.tenant, request.adapter)).encode())


def state_of(request, past, token):
    """What the model keeps for `token`, given the states that it reads before it."""
    return hash((namespace(request), len(past), sum(past), token))


def next_tokens(request, states, token_ids, count):
    """The model's next `count` tokens, greedily, after `token_ids` with these states."""
    states, tokens = list(states), []
    for _ in range(count):
        tokens.append(states[-1] % VOCABULARY)
        states.append(state_of(request, states, tokens[-1]))
    return tuple(tokens)


def alone(request, max_context):
    """The one right last output: what `request` yields without scheduler, blocks and company."""
    params = request.params
    tokens, answer, states = list(request.prompt_token_ids), [], []
    for token in tokens:
        states.append(state_of(request, states, token))
    reason, stop = ("length" if params.max_tokens == 0 else None), None
    while reason is None:
        token = states[-1] % VOCABULARY
        can_stop = len(answer) >= params.min_tokens
        answer.append(token)
        states.append(state_of(request, states, token))
        is_eos = token in request.eos_token_ids and not params.ignore_eos
        if can_stop and (is_eos or token in params.stop_token_ids):
            reason, stop = "stop", token
        elif len(answer) == params.max_tokens or len(tokens) + len(answer) == max_context:
            reason = "length"
    shown = answer[:-1] if stop is not None and not params.include_stop else answer
    return tuple(shown), reason, stop, len(answer)


class Model:
    """Runs steps: writes a state per new token to its slot, reads those before it."""

    def __init__(self, scheduler, answer_chunk=1):
        self.scheduler = scheduler
        self.answer_chunk = answer_chunk  # tokens sampled at a time
        self.slots = {}
        self.sequences = []
        self.deltas = defaultdict(list)  # (id, index) → outputs of `step`
        self.num_computed = 0

    def add(self, request):
        sequence = self.scheduler.add(request)
        self.sequences.append(sequence)
        return sequence

    def slot(self, sequence, position):
        size = self.scheduler.block_size
        return sequence.blocks[position // size] * size + position % size

    def run(self, step):
        for item in step.items:
            self.write(item)
        return [self.read(item) for item in step.items]

    def write(self, item):
        sequence, size = item.sequence, self.scheduler.block_size
        end = item.start + item.num_new_tokens
        written = sequence.blocks[item.start // size : -(-end // size)]
        for other in self.sequences:
            assert other is sequence or not set(written) & set(other.blocks), "writes to a block of somebody else"
        for position in range(item.start, end):
            past = [self.slots.get(self.slot(sequence, earlier), 0) for earlier in range(position)]
            self.slots[self.slot(sequence, position)] = state_of(sequence.request, past, sequence.token_ids[position])
        self.num_computed += item.num_new_tokens

    def read(self, item):
        sequence, request = item.sequence, item.sequence.request
        if sequence.finish_reason:  # nobody wants this any more, and an earlier step of its may have broken
            return StepResult((0,) if item.samples else ())
        end = item.start + item.num_new_tokens
        states = [self.slots[self.slot(sequence, position)] for position in range(end)]
        expected = []
        for token in sequence.token_ids[:end]:
            expected.append(state_of(request, expected, token))
        assert states == expected, "K/V of other tokens"
        tokens = next_tokens(request, states, sequence.token_ids, self.answer_chunk) if item.samples else ()
        return StepResult(tokens, self.logprobs(request, tokens), self.prompt_logprobs(item))

    def logprobs(self, request, tokens):
        return tuple(TokenLogprob(token, -1.0, 1) for token in tokens if request.params.logprobs is not None)

    def prompt_logprobs(self, item):
        request = item.sequence.request
        if request.params.prompt_logprobs is None:
            return ()
        first, last = item.start + 1, min(item.start + item.num_new_tokens + 1, item.sequence.num_prompt)
        entries = [TokenLogprob(request.prompt_token_ids[position], -1.0, 1) for position in range(first, last)]
        return tuple(entries) if item.start else (None, *entries)

    def step(self):
        """One whole step; its step and outputs."""
        step = self.scheduler.next_batch()
        assert step is not None
        outputs = self.scheduler.update(step, self.run(step))
        for output in outputs:
            self.deltas[output.request_id, output.index].append(output)
        return step, outputs

    def finish(self, max_steps=1000):
        """Steps until all is done; all outputs of `step` so far, collected by (id, index)."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                assert self.scheduler.next_batch() is None
                return {key: Output.collect(items) for key, items in self.deltas.items()}
            self.step()
        raise AssertionError(f"unfinished after {max_steps} steps")


def scheduler_of(**options):
    defaults = {
        "num_blocks": 64,
        "block_size": 4,
        "max_batch_size": 8,
        "max_batch_tokens": 32,
        "max_context": 128,
        "max_waiting": 100,
    }
    return Scheduler(**(defaults | options))


def request_of(name="a", prompt=(1, 2, 3), max_tokens=4, ignore_eos=True, eos=(EOS,), params=None, **options):
    params = params or {}
    return Request(
        name,
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **params),
        eos_token_ids=eos,
        **options,
    )


def assert_right(output, request, max_context=128):
    shown, reason, stop, num_tokens = alone(request, max_context)
    assert (output.token_ids, output.finish_reason, output.stop) == (shown, reason, stop)
    assert output.usage == Usage(len(request.prompt_token_ids), num_tokens, output.usage.cached_tokens)


def parts(step):
    return [(item.sequence.request.id, item.start, item.num_new_tokens, item.samples) for item in step.items]


# What goes into a step


def test_a_prompt_is_computed_in_chunks_and_then_token_by_token():
    model = Model(scheduler_of(max_batch_tokens=8))
    model.add(request_of(prompt=range(20), max_tokens=2))
    assert [parts(model.step()[0]) for _ in range(4)] == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 4, True)],
        [("a", 20, 1, True)],
    ]
    assert not model.scheduler.has_work


def test_decodes_go_first_and_prompts_share_what_is_left():
    model = Model(scheduler_of(max_batch_tokens=10, prefix_cache=False))
    model.add(request_of("long", range(6)))
    model.add(request_of("second", range(7)))
    assert parts(model.step()[0]) == [("long", 0, 6, True), ("second", 0, 4, False)]
    model.add(request_of("third", range(20)))
    step, _ = model.step()
    assert parts(step) == [("long", 6, 1, True), ("second", 4, 3, True), ("third", 0, 6, False)]
    assert step.num_tokens == 10


def test_an_urgent_prompt_goes_before_a_long_one_at_work():
    model = Model(scheduler_of(max_batch_tokens=10))
    model.add(request_of("long", range(40)))
    model.step()
    model.add(request_of("later", [7, 8]))
    model.add(request_of("urgent", [5, 6], priority=-1))
    assert parts(model.step()[0]) == [("urgent", 0, 2, True), ("long", 10, 8, False)]
    assert parts(model.step()[0]) == [("urgent", 2, 1, True), ("long", 18, 9, False)]


def test_waiting_requests_go_by_priority_then_arrival():
    model = Model(scheduler_of(max_batch_size=1))
    for name, priority in (("low", 5), ("first", 0), ("second", 0), ("high", -3)):
        model.add(request_of(name, max_tokens=1, priority=priority))
    order = [model.step()[0].items[0].sequence.request.id for _ in range(4)]
    assert order == ["high", "first", "second", "low"]


def test_logit_rows_limit_prompts_whose_logprobs_are_wanted():
    model = Model(scheduler_of(max_batch_size=3, max_logit_rows=5))
    model.add(request_of("decodes", [9]))
    model.step()
    model.add(request_of("plain", range(20, 30)))
    model.add(request_of("rows", range(10), params={"prompt_logprobs": 0}))
    assert parts(model.step()[0]) == [("decodes", 1, 1, True), ("plain", 0, 10, True), ("rows", 0, 3, False)]
    model.add(request_of("later", [5]))
    assert parts(model.step()[0])[2:] == [("rows", 3, 3, False)]
    assert parts(model.step()[0])[2:] == [("rows", 6, 3, False)]
    assert parts(model.step()[0])[0] == ("plain", 12, 1, True)


def test_next_batch_before_update_goes_on_with_what_is_known():
    scheduler = scheduler_of(max_batch_tokens=8)
    model = Model(scheduler)
    request = request_of(prompt=range(12))
    sequence = model.add(request)
    first, second = scheduler.next_batch(), scheduler.next_batch()
    assert (parts(first), parts(second)) == ([("a", 0, 8, False)], [("a", 8, 4, True)])
    assert scheduler.next_batch() is None  # the next token depends on the second step
    assert sequence.num_computed == 0
    assert scheduler.update(first, model.run(first)) == []
    (output,) = scheduler.update(second, model.run(second))
    assert output.token_ids == alone(request, 128)[0][:1]


def test_steps_are_updated_in_order_and_once():
    scheduler = scheduler_of(max_batch_tokens=8)
    model = Model(scheduler)
    model.add(request_of(prompt=range(12)))
    first, second = scheduler.next_batch(), scheduler.next_batch()
    with pytest.raises(EngineError, match="in the order"):
        scheduler.update(second, [StepResult((1,))])
    with pytest.raises(EngineError, match="1 sequences yielded 2 results"):
        scheduler.update(first, [StepResult(), StepResult()])
    scheduler.update(first, model.run(first))
    with pytest.raises(EngineError, match="once each"):
        scheduler.update(first, [StepResult()])


def test_several_tokens_may_be_sampled_at_once():
    scheduler = scheduler_of()
    model = Model(scheduler, answer_chunk=3)
    requests = [request_of(name, prompt, max_tokens=10) for name, prompt in (("a", (1, 2)), ("b", (3,)))]
    for request in requests:
        model.add(request)
    outputs = model.finish()
    for request in requests:
        assert_right(outputs[request.id, 0], request)


# Blocks


def test_short_pool_preempts_the_last_and_all_answers_are_right():
    scheduler = scheduler_of(num_blocks=8, max_context=32, prefix_cache=False)
    model = Model(scheduler)
    requests = [request_of(str(number), [number, 1, 2], max_tokens=20) for number in range(4)]
    sequences = [model.add(request) for request in requests]
    outputs = model.finish()
    for request in requests:
        assert_right(outputs[request.id, 0], request, 32)
    assert scheduler.stats.num_preemptions == sum(sequence.num_preemptions for sequence in sequences) > 0
    assert sequences[0].num_preemptions == 0  # the first in order never is
    assert scheduler.stats.num_used_blocks == 0


def test_preempted_work_is_found_again_in_the_prefix_cache():
    scheduler = scheduler_of(num_blocks=10, max_context=40)
    model = Model(scheduler)
    low = model.add(request_of("low", range(16), max_tokens=8, priority=1))
    model.step()
    model.add(request_of("high", range(50, 70), max_tokens=4))
    model.step()
    assert low.num_preemptions == 1
    model.num_computed = 0
    while model.scheduler.num_waiting:
        model.step()
    model.num_computed = 0
    outputs = model.finish()
    assert model.num_computed < 16
    assert_right(outputs["low", 0], low.request, 40)
    assert outputs["low", 0].usage.cached_tokens == 0  # its prompt was not in the cache when it came


def test_a_request_is_admitted_when_its_prompt_fits_beside_the_others():
    scheduler = scheduler_of(num_blocks=8, max_context=32, max_batch_tokens=8)
    model = Model(scheduler)
    first = model.add(request_of("first", range(12), max_tokens=8))
    model.step()
    big = model.add(request_of("big", range(20, 40), max_tokens=4))  # 5 blocks; the first has or needs 4
    small = model.add(request_of("small", [9], max_tokens=1))
    while not first.finish_reason:
        model.step()
        assert big.state is SequenceState.WAITING or first.finish_reason
        assert small.state is SequenceState.WAITING  # nobody overtakes
    model.finish()
    assert scheduler.stats.num_preemptions == 0


def test_a_waiting_request_preempts_running_ones_of_a_higher_number():
    scheduler = scheduler_of(max_batch_size=2)
    model = Model(scheduler)
    sequences = [model.add(request_of(name, max_tokens=9, priority=1)) for name in ("a", "b")]
    model.step()
    urgent = model.add(request_of("urgent", (5, 6)))
    peer = model.add(request_of("peer", (7, 8), priority=1))
    model.step()
    assert urgent.state is SequenceState.RUNNING
    assert [sequence.num_preemptions for sequence in sequences] == [0, 1]
    assert peer.state is SequenceState.WAITING
    outputs = model.finish()
    for sequence in (*sequences, urgent, peer):
        assert_right(outputs[sequence.request.id, 0], sequence.request)


def test_nobody_is_preempted_in_vain():
    scheduler = scheduler_of(num_blocks=8, max_context=32)
    model = Model(scheduler)
    model.add(request_of("same", range(8), max_tokens=9))
    low = model.add(request_of("low", range(20, 24), max_tokens=9, priority=1))
    model.step()
    model.add(request_of("urgent", range(30, 54), max_tokens=2))  # 6 blocks: does not fit beside "same"
    model.step()
    assert low.num_preemptions == 0


def test_a_big_request_is_not_starved_by_small_ones():
    scheduler = scheduler_of(num_blocks=8, max_context=32, max_batch_size=4)
    model = Model(scheduler)
    for number in range(4):
        model.add(request_of(f"early{number}", [number], max_tokens=3))
    big = model.add(request_of("big", range(24), max_tokens=4))
    for number in range(20):
        model.add(request_of(f"late{number}", [number], max_tokens=3))
        model.step()
        if big.finish_reason:
            break
    assert big.finish_reason == "length"


# The prefix cache


def test_a_known_prompt_is_taken_from_the_cache_but_for_its_last_token():
    scheduler = scheduler_of()
    model = Model(scheduler)
    for name, cached in (("a", 0), ("b", 8)):
        request = request_of(name, range(12))  # 3 full blocks, the last of which has the last token
        model.add(request)
        output = model.finish()[name, 0]
        assert_right(output, request)
        assert output.usage.cached_tokens == cached
    assert scheduler.stats.num_prefix_hit_tokens == 8
    assert scheduler.stats.num_prompt_tokens == 24


def test_an_answer_is_found_as_part_of_the_next_prompt():
    model = Model(scheduler_of())
    model.add(request_of("a", range(5), max_tokens=9))
    answer = model.finish()["a", 0].token_ids
    request = request_of("b", [*range(5), *answer, 11])
    model.add(request)
    output = model.finish()["b", 0]
    assert output.usage.cached_tokens == 12
    assert_right(output, request)


@pytest.mark.parametrize("other", [{"tenant": "t"}, {"adapter": "x"}, {"params": {"prompt_logprobs": 0}}])
def test_these_requests_take_nothing_from_the_cache(other):
    model = Model(scheduler_of())
    model.add(request_of("a", range(12)))
    model.finish()
    request = request_of("b", range(12), **other)
    model.add(request)
    output = model.finish()["b", 0]
    assert output.usage.cached_tokens == 0
    assert_right(output, request)


def test_without_prefix_cache_nothing_is_kept():
    scheduler = scheduler_of(prefix_cache=False)
    model = Model(scheduler)
    for name in "ab":
        model.add(request_of(name, range(12)))
        assert model.finish()[name, 0].usage.cached_tokens == 0
    assert scheduler.stats.num_idle_blocks == 0


def test_prompts_that_come_together_compute_their_common_part_once():
    scheduler = scheduler_of(max_batch_size=16, max_batch_tokens=16)
    model = Model(scheduler)
    system = [*range(40)]
    requests = [request_of(f"r{number}", [*system, number], max_tokens=1) for number in range(12)]
    for request in requests:
        model.add(request)
    outputs = model.finish()
    for request in requests:
        assert_right(outputs[request.id, 0], request)
    assert model.num_computed == len(system) + len(requests)


def test_answers_to_one_prompt_share_it():
    model = Model(scheduler_of())
    requests = [request_of("a", range(9), index=index) for index in range(4)]
    for request in requests:
        model.add(request)
    outputs = model.finish()
    assert [outputs["a", index].usage.cached_tokens for index in range(4)] == [0, 8, 8, 8]


def test_a_prompt_waits_once_for_a_block():
    scheduler = scheduler_of()
    model = Model(scheduler)
    follower = model.add(request_of("follower", range(9)))
    for number in range(2):  # a request that goes before it computes the same block, but is cancelled
        model.add(request_of(f"urgent{number}", range(9), priority=-1))
        step = scheduler.next_batch()
        scheduler.cancel(f"urgent{number}")
        if number == 0:
            assert parts(step) == [("urgent0", 0, 9, True)]
            scheduler.update(step, model.run(step))
    assert parts(step) == [("urgent1", 0, 9, True), ("follower", 0, 9, True)]
    for output in scheduler.update(step, model.run(step)):
        model.deltas[output.request_id, output.index].append(output)
    assert_right(model.finish()["follower", 0], follower.request)


# How answers end


def prompt_ending_with(token, after):
    """A prompt whose answer has `token` first at position `after`."""
    for start in range(10_000):
        request = request_of(prompt=(start, 1), max_tokens=after + 1)
        answer = alone(request, 128)[0]
        if token in answer and answer.index(token) == after:
            return (start, 1)
    raise AssertionError("no such prompt")


@pytest.mark.parametrize(
    ("token", "options", "num_shown", "num_counted", "reason"),
    [
        (EOS, {"ignore_eos": False}, 2, 3, "stop"),
        (EOS, {"ignore_eos": False, "params": {"include_stop": True}}, 3, 3, "stop"),
        (EOS, {"ignore_eos": True}, 6, 6, "length"),
        (EOS, {"ignore_eos": True, "params": {"stop_token_ids": (EOS,)}}, 2, 3, "stop"),
        (EOS, {"ignore_eos": False, "params": {"min_tokens": 2}}, 2, 3, "stop"),
        (STOP, {"params": {"stop_token_ids": (STOP,)}}, 2, 3, "stop"),
        (STOP, {"params": {"stop_token_ids": (STOP,), "include_stop": True}}, 3, 3, "stop"),
        (STOP, {"max_tokens": 3, "params": {"stop_token_ids": (STOP,)}}, 2, 3, "stop"),
        (STOP, {"max_tokens": 2, "params": {"stop_token_ids": (STOP,)}}, 2, 2, "length"),
    ],
)
def test_endings(token, options, num_shown, num_counted, reason):
    model = Model(scheduler_of())
    options = {"max_tokens": 6} | options
    params = options.pop("params", {}) | {"logprobs": 0}
    request = request_of(prompt=prompt_ending_with(token, 2), params=params, **options)
    sequence = model.add(request)
    output = model.finish()["a", 0]
    assert len(output.token_ids) == len(output.logprobs) == num_shown
    assert output.usage == Usage(2, num_counted)
    assert (output.finish_reason, output.stop) == (reason, token if reason == "stop" else None)
    assert sequence.finish_reason == reason
    assert sequence.stop == output.stop
    assert sequence.state is SequenceState.FINISHED


def test_no_end_before_min_tokens():
    model = Model(scheduler_of())
    model.add(request_of(prompt=prompt_ending_with(EOS, 2), ignore_eos=False, max_tokens=3, params={"min_tokens": 3}))
    assert model.finish()["a", 0].finish_reason == "length"


def test_without_max_tokens_the_context_is_the_limit():
    model = Model(scheduler_of(max_context=10))
    model.add(request_of(max_tokens=None))
    output = model.finish()["a", 0]
    assert (output.usage, output.finish_reason) == (Usage(3, 7), "length")


def test_prompt_logprobs_without_an_answer():
    model = Model(scheduler_of(max_batch_tokens=8))
    model.add(request_of(prompt=range(20), max_tokens=0, params={"prompt_logprobs": 0}))
    output = model.finish()["a", 0]
    assert (output.token_ids, output.finish_reason, output.usage) == ((), "length", Usage(20, 0))
    assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, *range(1, 20)]


def test_prompt_logprobs_come_once_despite_preemption():
    scheduler = scheduler_of(max_batch_tokens=8, max_batch_size=1)
    model = Model(scheduler)
    sequence = model.add(request_of(prompt=range(20), priority=1, params={"prompt_logprobs": 0}))
    model.step()
    model.step()
    model.add(request_of("urgent", max_tokens=1))
    model.step()
    assert sequence.num_preemptions == 1
    output = model.finish()["a", 0]
    assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, *range(1, 20)]
    assert_right(output, sequence.request)


# Endings from outside


def test_cancelling_a_waiting_and_a_running_request():
    scheduler = scheduler_of(max_batch_size=1)
    model = Model(scheduler)
    model.add(request_of("runs", max_tokens=9))
    model.add(request_of("waits"))
    _, (output,) = model.step()
    assert scheduler.cancel("waits") == Output("waits", finish_reason="cancelled", usage=Usage(3, 0))
    assert scheduler.cancel("runs") == Output("runs", finish_reason="cancelled", usage=Usage(3, len(output.token_ids)))
    assert scheduler.cancel("runs") is None
    assert scheduler.cancel("unknown") is None
    assert not scheduler.has_work and scheduler.stats.num_used_blocks == 0


def test_cancelling_during_a_step_frees_blocks_after_it():
    scheduler = scheduler_of(num_blocks=4, max_context=16)
    model = Model(scheduler)
    model.add(request_of(prompt=range(10)))
    step = scheduler.next_batch()
    assert scheduler.cancel("a").is_final
    assert not scheduler.has_work
    assert scheduler.stats.num_used_blocks == 3
    again = model.add(request_of(prompt=range(20, 30)))  # the same id is free at once, the blocks are not
    assert scheduler.next_batch() is None
    assert scheduler.update(step, model.run(step)) == []
    assert scheduler.stats.num_used_blocks == 0
    assert_right(model.finish()["a", 0], again.request)


def test_finishing_for_a_stop_string():
    scheduler = scheduler_of()
    model = Model(scheduler)
    sequence = model.add(request_of(max_tokens=9))
    model.step()
    output = scheduler.finish("a", 0, "stop", "END")
    assert (output.finish_reason, output.stop, output.usage) == ("stop", "END", Usage(3, 1))
    assert sequence.finish_reason == "stop"
    assert not scheduler.has_work


def test_a_broken_step_ends_its_sequences_only():
    scheduler = scheduler_of(max_batch_size=1)
    model = Model(scheduler)
    model.add(request_of("breaks"))
    waits = model.add(request_of("waits"))
    error = EngineError("the device is gone")
    step = scheduler.next_batch()
    (output,) = scheduler.fail(error, step)
    assert (output.request_id, output.finish_reason, output.error) == ("breaks", "error", error)
    assert scheduler.stats.num_used_blocks == 0
    assert_right(model.finish()["waits", 0], waits.request)


def test_failing_all():
    scheduler = scheduler_of(max_batch_size=1)
    for name in "ab":
        scheduler.add(request_of(name))
    step = scheduler.next_batch()
    outputs = scheduler.fail(EngineError("dead"))
    assert sorted((output.request_id, output.finish_reason) for output in outputs) == [("a", "error"), ("b", "error")]
    assert not scheduler.has_work
    assert scheduler.fail(EngineError("dead"), step) == []  # each request has had its last output
    assert scheduler.stats.num_used_blocks == 0


# Refusals


def test_a_full_queue_refuses():
    scheduler = scheduler_of(max_waiting=2)
    for name in "ab":
        scheduler.add(request_of(name))
    with pytest.raises(CapacityError, match="2 requests are waiting, and max_waiting is 2: try again later"):
        scheduler.add(request_of("c"))
    assert scheduler.num_waiting == 2


def test_an_id_is_used_once_at_a_time():
    scheduler = scheduler_of()
    scheduler.add(request_of("a"))
    scheduler.add(request_of("a", index=1))
    with pytest.raises(RequestError, match="'a' \\(answer 1\\) is already in work"):
        scheduler.add(request_of("a", index=1))


def test_what_can_never_fit_the_pool_is_refused_and_what_just_fits_runs():
    scheduler = scheduler_of(num_blocks=4, max_context=64)
    with pytest.raises(
        CapacityError, match=r"prompt \(10 tokens\) and answer \(up to 8\) need 5 KV blocks of 4"
    ) as info:
        scheduler.add(request_of(prompt=range(10), max_tokens=8))
    assert "has 4 (16 tokens): lower max_tokens" in str(info.value)
    request = request_of(prompt=range(10), max_tokens=7)
    model = Model(scheduler)
    model.add(request)
    assert_right(model.finish()["a", 0], request, 64)


def test_a_prompt_that_fills_the_context_is_refused():
    scheduler = scheduler_of(max_context=8)
    with pytest.raises(ContextOverflowError, match="the prompt has 8 tokens and the context 8"):
        scheduler.add(request_of(prompt=range(8)))
    scheduler.add(request_of(prompt=range(8), max_tokens=0, params={"prompt_logprobs": 0}))


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_batch_size", "max_context", "max_waiting"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        scheduler_of(**{name: 0})


def test_a_step_has_room_for_every_decode():
    with pytest.raises(ConfigError, match="max_batch_tokens is 4, but 8 sequences"):
        scheduler_of(max_batch_tokens=4)
    with pytest.raises(ConfigError, match="max_logit_rows is 4, but 8 sequences"):
        scheduler_of(max_logit_rows=4)


# Anything, in any order


prompts = st.builds(
    lambda common, length, tail: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9][:length] if common else tail,
    st.booleans(),
    st.integers(1, 10),
    st.lists(st.integers(0, 1), min_size=1, max_size=10),
) | st.lists(st.integers(0, 1), min_size=1, max_size=14)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations, failures and pipelining over tiny pools."""

    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        max_batch_size=st.integers(1, 5),
        more_tokens=st.integers(0, 8),
        more_rows=st.none() | st.integers(0, 3),
        max_context=st.integers(6, 24),
        prefix_cache=st.booleans() | st.just(True),
        answer_chunk=st.sampled_from([1, 1, 3]),
        depth=st.integers(1, 3),
    )
    def start(self, more_tokens, more_rows, answer_chunk, depth, **options):
        self.scheduler = Scheduler(
            max_batch_tokens=options["max_batch_size"] + more_tokens,
            max_waiting=12,
            max_logit_rows=None if more_rows is None else options["max_batch_size"] + more_rows,
            **options,
        )
        self.options = options
        self.model = Model(self.scheduler, answer_chunk)
        self.depth = depth  # steps that may be in flight
        self.steps = []
        self.alive = {}  # (id, index) → request
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
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        tenant=st.sampled_from(["", "", "other"]),
        adapter=st.sampled_from([None, None, "x"]),
        num_answers=st.sampled_from([1, 1, 3]),
    )
    def add(self, prompt, max_tokens, min_tokens, want_logprobs, want_prompt_logprobs, num_answers, **options):
        params = SamplingParams(
            max_tokens=max_tokens if want_prompt_logprobs else max_tokens or None,
            min_tokens=min(min_tokens, max_tokens or 0),
            ignore_eos=options.pop("ignore_eos"),
            include_stop=options.pop("include_stop"),
            stop_token_ids=(STOP,),
            logprobs=0 if want_logprobs else None,
            prompt_logprobs=0 if want_prompt_logprobs else None,
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
                self.model.add(request)
            except ContextOverflowError:
                assert len(prompt) + (params.max_tokens != 0) > self.options["max_context"]
            except CapacityError:
                assert full or max(len(prompt), longest - 1) > capacity
            else:
                assert not full and max(len(prompt), longest - 1) <= capacity
                self.alive[request.id, index] = request

    def take(self, outputs):
        for output in outputs:
            key = (output.request_id, output.index)
            assert key in self.alive, "output after the last one"
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
        return num_prompt_rows + item.samples

    @precondition(lambda self: len(self.steps) < self.depth)
    @rule()
    def dispatch(self):
        step = self.scheduler.next_batch()
        if step is None:
            assert self.steps or not self.alive, "idle with work to do"
            return
        sequences = [item.sequence for item in step.items]
        assert len(set(map(id, sequences))) == len(sequences) <= self.options["max_batch_size"]
        assert sum(map(self.num_logit_rows, step.items)) <= self.scheduler.max_logit_rows
        assert step.num_tokens == sum(item.num_new_tokens for item in step.items) <= self.scheduler.max_batch_tokens
        for item in step.items:
            assert item.num_new_tokens > 0
            assert len(item.sequence.blocks) * self.options["block_size"] >= item.start + item.num_new_tokens
        self.steps.append(step)

    @precondition(lambda self: self.steps)
    @rule(breaks=st.sampled_from([False, False, False, True]))
    def complete(self, breaks=False):
        step = self.steps.pop(0)
        if breaks:
            self.take(self.scheduler.fail(EngineError("broken"), step))
        else:
            self.take(self.scheduler.update(step, self.model.run(step)))

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
        held = {block for sequence in self.model.sequences for block in sequence.blocks}
        assert stats.num_used_blocks == len(held) <= stats.num_blocks
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
