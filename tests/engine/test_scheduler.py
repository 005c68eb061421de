"""The scheduler (with job.py and step.py), case by case."""

from __future__ import annotations

import pytest
from fake_model import EOS, STOP, Model, alone, assert_right, parts, request_of, scheduler_of

from turbolm.engine.step import Step, StepResult
from turbolm.errors import CapacityError, ConfigError, ContextOverflowError, EngineError, RequestError
from turbolm.types import Grammar, LoadedAdapter, Output, SequenceState, Usage

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


def test_prompts_of_a_size_of_their_own_are_not_cut_for_decodes():
    model = Model(scheduler_of(max_batch_tokens=16, max_prompt_tokens=8, prefix_cache=False))
    for name in ("first", "second", "third"):
        model.add(request_of(name, range(8)))
    assert parts(model.step()[0]) == [("first", 0, 8, True)]
    assert parts(model.step()[0]) == [("first", 8, 1, True), ("second", 0, 8, True)]
    assert parts(model.step()[0]) == [("first", 9, 1, True), ("second", 8, 1, True), ("third", 0, 8, True)]


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


def test_next_batch_before_update_goes_on_with_what_is_known_and_one_token_ahead():
    scheduler = scheduler_of(max_batch_tokens=8)
    model = Model(scheduler)
    request = request_of(prompt=range(12))
    sequence = model.add(request)
    steps = [scheduler.next_batch() for _ in range(3)]
    assert list(map(parts, steps)) == [[("a", 0, 8, False)], [("a", 8, 4, True)], [("a", 12, 1, True)]]
    assert [step.items[0].follows for step in steps] == [False, False, True]
    assert scheduler.next_batch() is None  # would be two tokens ahead
    assert sequence.num_computed == 0
    pending = [model.submit(step) for step in steps]
    outputs = [scheduler.update(step, later.results()) for step, later in zip(steps, pending, strict=True)]
    answer = alone(request, 128)[0]
    assert [[output.token_ids for output in its] for its in outputs] == [[], [answer[:1]], [answer[1:2]]]


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


# Running ahead


def started(model, count):
    """The next steps, in flight, as (id, whether it follows) per item."""
    return [[(i.sequence.request.id, i.follows) for i in (model.start() or Step((), 0)).items] for _ in range(count)]


def test_decodes_run_one_step_ahead_to_the_last_token_that_is_needed():
    model = Model(scheduler_of())
    model.add(request_of(max_tokens=3))
    assert started(model, 2) == [[("a", False)], [("a", True)]]
    model.complete()
    assert started(model, 1) == [[("a", True)]]
    model.complete()
    assert started(model, 1) == [[]]  # the last token is not computed
    assert model.complete()[0].finish_reason == "length"


def test_a_new_request_joins_those_that_run_ahead():
    model = Model(scheduler_of())
    model.add(request_of("old", max_tokens=9))
    started(model, 2)
    model.add(request_of("new", [5, 6], max_tokens=9))
    model.complete()
    assert started(model, 1) == [[("old", True), ("new", False)]]
    model.complete()
    assert started(model, 1) == [[("old", True), ("new", True)]]


def test_an_answer_by_a_grammar_waits_for_each_token_and_the_next_step_with_it():
    options = {"params": {"grammar": Grammar("json")}, "ignore_eos": False, "eos": ()}
    model = Model(scheduler_of(max_batch_tokens=9))
    model.add(request_of("plain", [9]))
    model.add(request_of("reads", range(16), **options))
    assert started(model, 3) == [[("plain", False), ("reads", False)], [("plain", True), ("reads", False)], []]
    model.complete()
    assert started(model, 1) == [[]]
    model.complete()
    assert started(model, 2) == [[("plain", False), ("reads", False)], []]
    outputs = model.finish(depth=2)
    for sequence in model.sequences:
        assert_right(outputs[sequence.request.id, 0], sequence.request)


def test_a_stop_token_wastes_one_computation_and_keeps_its_block_until_then():
    scheduler = scheduler_of(block_size=3)
    model = Model(scheduler)
    request = request_of(prompt=prompt_ending_with(STOP, 1), max_tokens=50, params={"stop_token_ids": (STOP,)})
    model.add(request)
    started(model, 2)
    model.complete()
    started(model, 1)  # computes the stop token, in a block of its own
    (output,) = model.complete()
    assert (output.finish_reason, output.usage) == ("stop", Usage(2, 2))
    assert not scheduler.has_work and scheduler.next_batch() is None
    assert scheduler.stats.num_used_blocks == 2
    assert model.complete() == []
    assert scheduler.stats.num_used_blocks == 0
    assert_right(Output.collect(model.deltas["a", 0]), request)


def test_nobody_is_preempted_for_a_token_ahead():
    scheduler = scheduler_of(num_blocks=3, block_size=4, max_context=16, prefix_cache=False)
    model = Model(scheduler)
    model.add(request_of("first", range(3), max_tokens=9))
    model.add(request_of("second", range(4), max_tokens=3))
    assert started(model, 2) == [[("first", False), ("second", False)], [("first", True), ("second", True)]]
    model.complete()
    assert started(model, 1) == [[("second", True)]]  # "first" has 4 tokens, and all blocks are taken
    model.complete()
    assert started(model, 1) == [[]]  # it needs one now, but "second" is in a step
    outputs = model.finish(depth=2)
    assert scheduler.stats.num_preemptions == 0  # it ended with that step
    for sequence in model.sequences:
        assert_right(outputs[sequence.request.id, 0], sequence.request, 16)


def test_nobody_is_held_while_blocks_are_about_to_return():
    scheduler = scheduler_of(num_blocks=3, block_size=4, prefix_cache=False)
    model = Model(scheduler)
    for name in "cd":
        model.add(request_of(name, [3], max_tokens=4, priority=1))
    model.step()
    model.add(request_of("a", range(4), max_tokens=3))
    assert started(model, 2) == [[("c", False), ("d", False), ("a", False)], [("c", True), ("d", True)]]
    model.complete()
    scheduler.cancel("c")
    assert started(model, 1) == [[("d", True)]]  # "a" waits for the block of "c"
    model.complete()
    assert started(model, 1) == [[("a", False)]]
    model.finish(depth=2)
    assert scheduler.stats.num_preemptions == 0


def test_a_token_ahead_counts_where_blocks_are_set_aside():
    model = Model(scheduler_of(num_blocks=3, block_size=4, prefix_cache=False))
    model.add(request_of("a", range(4), max_tokens=9))
    assert started(model, 2) == [[("a", False)], [("a", True)]]  # 5 tokens in 2 blocks, and one to grow
    model.add(request_of("b", [5], max_tokens=1))
    assert started(model, 1) == [[]]


def test_what_follows_drafts_waits_for_them():
    class Guess:
        def propose(self, limit, num_decodes):
            return (0,)[:limit]

    model = Model(scheduler_of(drafter=lambda token_ids: Guess()))
    request = request_of(max_tokens=9)
    model.add(request)
    model.step()
    assert model.start().items[0].drafts == (0,)
    assert started(model, 1) == [[]]
    assert_right(model.finish(depth=2)["a", 0], request)


def test_an_urgent_request_preempts_those_that_run_ahead_after_their_step():
    scheduler = scheduler_of(max_batch_size=2)
    model = Model(scheduler)
    low = [model.add(request_of(name, [number], max_tokens=30, priority=1)) for number, name in enumerate("ab")]
    started(model, 2)
    model.add(request_of("urgent", (5, 6)))
    model.complete()
    assert started(model, 1) == [[("a", True)]]  # "b" is held
    model.complete()
    assert started(model, 1) == [[("a", True), ("urgent", False)]]
    assert [sequence.num_preemptions for sequence in low] == [0, 1]
    outputs = model.finish(depth=2)
    for sequence in model.sequences:
        assert_right(outputs[sequence.request.id, 0], sequence.request)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_short_pool_yields_the_same_answers_however_many_steps_are_in_flight(depth):
    scheduler = scheduler_of(num_blocks=8, max_context=32, max_batch_tokens=9)
    model = Model(scheduler)
    requests = [request_of(str(number), [number] * (number + 1), max_tokens=20) for number in range(6)]
    for request in requests:
        model.add(request)
    outputs = model.finish(depth=depth)
    for request in requests:
        assert_right(outputs[request.id, 0], request, 32)
    assert scheduler.stats.num_preemptions > 0
    assert scheduler.stats.num_used_blocks == 0


def test_a_broken_step_ends_what_follows_it():
    scheduler = scheduler_of(max_batch_size=2)
    model = Model(scheduler)
    model.add(request_of("breaks"))
    assert started(model, 1) == [[("breaks", False)]]
    other = model.add(request_of("other", [5]))
    assert started(model, 1) == [[("breaks", True), ("other", False)]]
    error = EngineError("the device is gone")
    step, pending = model.flights.popleft()
    pending.lose()
    (output,) = scheduler.fail(error, step)
    assert (output.request_id, output.error, output.token_ids) == ("breaks", error, ())
    assert [output.request_id for output in model.complete()] == ["other"]
    assert_right(model.finish(depth=2)["other", 0], other.request)
    assert scheduler.stats.num_used_blocks == 0


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


@pytest.mark.parametrize(
    "other", [{"tenant": "t"}, {"loaded_adapter": LoadedAdapter("x", 1, 0)}, {"params": {"prompt_logprobs": 0}}]
)
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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("include_stop", [False, True])
def test_without_deltas_the_last_output_has_all(depth, include_stop):
    params = {"stop_token_ids": (STOP,), "include_stop": include_stop, "logprobs": 0, "prompt_logprobs": 0}
    request = request_of(prompt=[3, 5, *prompt_ending_with(STOP, 4)], max_tokens=9, params=params)
    found = []
    for deltas in (True, False):
        model = Model(scheduler_of(max_batch_tokens=8))
        model.add(request, deltas=deltas)
        found.append(model.finish(depth=depth)["a", 0])
        assert (len(model.deltas["a", 0]) == 1) is not deltas
    assert found[0] == found[1]
    assert_right(found[1], request)


def test_without_deltas_what_there_is_comes_with_a_cancellation():
    model = Model(scheduler_of())
    request = request_of(max_tokens=9, params={"logprobs": 0})
    model.add(request, deltas=False)
    for _ in range(3):
        assert model.step()[1] == []
    output = model.scheduler.cancel("a")
    assert output.token_ids == alone(request, 128)[0][:3]
    assert tuple(entry.token_id for entry in output.logprobs) == output.token_ids
    assert (output.finish_reason, output.usage) == ("cancelled", Usage(3, 3))


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
