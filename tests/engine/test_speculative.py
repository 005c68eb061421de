"""Drafts: what prompt lookup guesses, when it pays, and what the scheduler does with drafts."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from fake_model import EOS, Model, Oracle, alone, assert_right, parts, request_of, scheduler_of
from hypothesis import given
from hypothesis import strategies as st

from turbolm.engine.speculative import MAX_DRAFTS, MAX_ROWS, PromptLookup, num_accepted, num_worth
from turbolm.engine.step import StepResult
from turbolm.errors import EngineError

# Prompt lookup


def drafts_of(*token_ids: int, limit: int = MAX_DRAFTS) -> tuple[int, ...]:
    return PromptLookup(list(token_ids)).propose(limit, 1)


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert drafts_of(1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4)[:2] == (5, 6)
    assert drafts_of(1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, limit=1) == (5,)


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    assert drafts_of(*range(100)) == ()
    assert drafts_of(1) == drafts_of(1, 2) == ()


def test_a_longer_match_goes_before_a_later_one() -> None:
    assert drafts_of(1, 2, 3, 4, 50, 0, 3, 4, 60, 0, 1, 2, 3, 4)[0] == 50
    assert drafts_of(9, 3, 4, 50, 0, 8, 3, 4, 60, 0, 7, 3, 4)[0] == 60


def test_a_repetition_is_taken_to_go_on() -> None:
    assert PromptLookup([7, 8, 9, 5, 5, 5, 5, 5]).propose(2, 1) == (5, 5)
    lookup = PromptLookup(tokens := [1, 2, 3] * 3)
    for _ in range(10):
        tokens += (1, 2, 3)
        proposed = lookup.propose(8, 1)
    assert proposed == (1, 2, 3, 1, 2, 3, 1, 2)


@given(st.lists(st.integers(0, 2), min_size=5, max_size=40), st.integers(1, 10))
def test_lookup_finds_what_a_search_finds(token_ids: list[int], start: int) -> None:
    growing = token_ids[:start]
    lookup = PromptLookup(growing)
    for token in token_ids[start:]:
        growing.append(token)
        ends = [
            (length, end)
            for length in (4, 2)
            for end in range(length, len(growing))
            if growing[end - length : end] == growing[len(growing) - length :]
        ]
        with mock.patch("turbolm.engine.speculative.num_worth", return_value=1):
            assert lookup.propose(1, 1) == ((growing[max(ends)[1]],) if ends else ())


def test_wrong_guesses_end_drafts_and_right_ones_bring_them_back() -> None:
    tokens = [0, 1]
    lookup = PromptLookup(tokens)
    num_drafts = []
    for number in range(40):  # 0 1 is followed by something else each time
        tokens += (100 + number, 0, 1)
        num_drafts.append(len(lookup.propose(MAX_DRAFTS, 1)))
    assert num_drafts[0] > 0
    assert sum(num_drafts[-20:]) == 0
    text = range(200, 240)
    tokens += text
    for token in text:  # none of this was drafted at first
        tokens.append(token)
        num_drafts.append(len(lookup.propose(MAX_DRAFTS, 1)))
    assert num_drafts[-1] == MAX_DRAFTS


def test_drafts_are_longer_where_they_are_right_and_shorter_where_many_decode() -> None:
    lengths = [num_worth(acceptance / 100, 1) for acceptance in range(101)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, MAX_DRAFTS)
    crowd = [num_worth(0.8, num_decodes) for num_decodes in range(1, MAX_ROWS)]
    assert crowd == sorted(crowd, reverse=True)
    assert crowd[0] > crowd[-1]


def test_drafts_count_up_to_the_first_wrong_one() -> None:
    assert num_accepted((), (5,)) == 0
    assert num_accepted((1, 2, 3), (1, 2, 3, 4)) == 3
    assert num_accepted((1, 2, 3), (1, 9, 3, 4)) == 1


# In the scheduler


def oracle(lies: float = 0.0) -> object:
    """A drafter that proposes as much as it may; right but for `lies`."""
    always_all = random.Random(1)
    always_all.randint = lambda low, high: high  # type: ignore[method-assign]
    return lambda token_ids: Oracle(token_ids, always_all, lies)


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    request = request_of(max_tokens=30)
    num_steps = {}
    for lies in (None, 0.0, 1.0):
        scheduler = scheduler_of(drafter=None if lies is None else oracle(lies))
        model = Model(scheduler)
        model.add(request)
        assert_right(model.finish()["a", 0], request)
        num_steps[lies] = scheduler.stats.num_steps
        stats = scheduler.stats
        assert stats.num_accepted_tokens == (stats.num_draft_tokens if lies == 0 else 0)
        assert (stats.num_draft_tokens > 0) == (lies is not None)
    assert num_steps == {None: 30, 0.0: 5, 1.0: 30}  # 1 + 9 + 9 + 9 + 2


def test_an_item_carries_its_drafts_and_goes_on_after_the_right_ones() -> None:
    model = Model(scheduler_of(drafter=oracle()))
    request = request_of(max_tokens=20)
    sequence = model.add(request)
    answer = alone(request, 128)[0]
    model.step()
    step, (output,) = model.step()
    assert parts(step) == [("a", 3, 1, True)]
    assert (step.items[0].drafts, step.num_tokens) == (answer[1:9], 9)
    assert output.token_ids == answer[1:10]
    assert sequence.num_computed == 12
    assert parts(model.step()[0]) == [("a", 12, 1, True)]


def test_a_stop_token_among_right_drafts_ends_the_answer_there() -> None:
    for start in range(1000):
        request = request_of(prompt=(start, 1), max_tokens=20, ignore_eos=False, params={"logprobs": 0})
        shown, reason, stop, num_tokens = alone(request, 128)
        if reason == "stop" and 3 <= len(shown) <= 6:
            break
    model = Model(scheduler_of(drafter=oracle()))
    sequence = model.add(request)
    model.step()
    step, (output,) = model.step()
    assert EOS in step.items[0].drafts[:-1]
    assert (output.token_ids, output.finish_reason, output.stop) == (shown[1:], "stop", stop)
    assert len(output.logprobs) == len(shown) - 1
    assert sequence.num_computed <= len(sequence.token_ids)
    assert output.usage.completion_tokens == num_tokens
    assert model.scheduler.stats.num_used_blocks == 0


def test_what_right_drafts_left_is_found_in_the_prefix_cache_and_what_wrong_ones_left_is_not() -> None:
    for lies in (0.0, 0.5):
        scheduler = scheduler_of(drafter=oracle(lies))
        model = Model(scheduler)
        first = request_of("a", range(5), max_tokens=20)
        model.add(first)
        answer = model.finish()["a", 0].token_ids
        second = request_of("b", [*range(5), *answer, 11])
        model.add(second)
        output = model.finish()["b", 0]
        assert_right(output, second)
        assert output.usage.cached_tokens == 24


def test_drafts_stop_at_the_longest_answer() -> None:
    model = Model(scheduler_of(drafter=oracle(), max_context=9))
    model.add(request_of("context", max_tokens=None))
    model.add(request_of("answer", max_tokens=4))
    model.step()
    step, _ = model.step()
    assert [len(item.drafts) for item in step.items] == [4, 2]  # and a token each that isn't computed
    assert not model.scheduler.has_work


def test_drafts_leave_the_step_to_prompts() -> None:
    model = Model(scheduler_of(drafter=oracle(), max_batch_tokens=8, max_batch_size=2))
    model.add(request_of("decodes", max_tokens=30))
    model.step()
    model.add(request_of("prompt", range(20)))
    assert parts(step := model.step()[0]) == [("decodes", 3, 1, True), ("prompt", 0, 7, False)]
    assert step.items[0].drafts == ()
    model.step()
    assert [len(item.drafts) for item in model.step()[0].items] == [1, 0]  # 8 = 1 + 6 of the prompt + 1


def test_rows_of_logits_and_the_number_of_decodes_limit_drafts() -> None:
    model = Model(scheduler_of(drafter=oracle(), max_batch_size=3, max_logit_rows=5))
    for name in "abc":
        model.add(request_of(name, max_tokens=30))
    model.step()
    assert [len(item.drafts) for item in model.step()[0].items] == [1, 1, 0]
    many = Model(scheduler_of(drafter=oracle(), num_blocks=999, max_batch_size=MAX_ROWS, max_batch_tokens=256))
    for number in range(MAX_ROWS):
        many.add(request_of(str(number), [number, 1], max_tokens=30 if number else 2))
    many.step()
    assert not any(item.drafts for item in many.step()[0].items)
    assert sum(item.num_tokens for item in many.step()[0].items) == MAX_ROWS  # one has ended


def test_nobody_is_preempted_for_drafts_and_they_take_no_block_that_others_need() -> None:
    for lies in (0.0, 1.0):
        scheduler = scheduler_of(num_blocks=8, block_size=4, max_context=20, drafter=oracle(lies), prefix_cache=False)
        model = Model(scheduler)
        requests = [request_of(str(number), [number, 1, 2], max_tokens=13) for number in range(2)]
        for request in requests:  # both fit to the end, and nothing is left over
            model.add(request)
        outputs = model.finish()
        for request in requests:
            assert_right(outputs[request.id, 0], request, 20)
        assert scheduler.stats.num_preemptions == 0
        assert scheduler.stats.num_draft_tokens > 0


def test_drafts_leave_each_sequence_its_next_block() -> None:
    scheduler = scheduler_of(num_blocks=10, block_size=1, max_context=10, drafter=oracle(1.0))
    model = Model(scheduler)
    for number in range(2):
        model.add(request_of(str(number), [number, 1, 2], max_tokens=None))
    model.step()
    step, _ = model.step()  # 8 of the 10 blocks are taken
    assert [len(item.drafts) for item in step.items] == [1, 1]
    model.step()
    assert scheduler.stats.num_preemptions == 0


def test_blocks_held_for_drafts_are_not_given_away_twice() -> None:
    scheduler = scheduler_of(num_blocks=16, block_size=1, max_context=16, drafter=oracle(1.0))
    model = Model(scheduler)
    requests = [request_of("a", max_tokens=12), request_of("b", range(6), max_tokens=4)]
    sequence = model.add(requests[0])
    model.step()
    model.step()
    assert len(sequence.blocks) == 12
    model.add(requests[1])  # 4 blocks are left
    step, _ = model.step()
    assert parts(step) == [("a", 4, 1, True)]
    outputs = model.finish()
    for request in requests:
        assert_right(outputs[request.id, 0], request, 16)


def test_drafts_take_no_new_blocks_while_somebody_waits() -> None:
    scheduler = scheduler_of(max_batch_size=1, drafter=oracle())
    model = Model(scheduler)
    sequence = model.add(request_of("runs", range(4), max_tokens=30))
    model.add(request_of("waits"))
    model.step()
    step, _ = model.step()
    assert len(step.items[0].drafts) == 3  # the second block's other slots
    assert len(sequence.blocks) == 2


def test_results_that_do_not_follow_the_drafts_are_refused() -> None:
    scheduler = scheduler_of(drafter=oracle())
    model = Model(scheduler)
    model.add(request_of(max_tokens=20))
    model.step()
    step = scheduler.next_batch()
    first, *_, last = step.items[0].drafts
    for tokens in ((), ((first + 1) % 12, 3), (*step.items[0].drafts, last, last)):
        with pytest.raises(EngineError, match=r"tokens for samples|don't follow"):
            scheduler.update(step, [StepResult(tokens)])
    assert scheduler.update(step, [StepResult((first, 3))])[0].token_ids == (first, 3)
