"""Each sampling parameter does what its name says; each test fails if its parameter did nothing."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.engine import randomness
from turbolm.engine.sampler import Choice, Sampler
from turbolm.ops.sampling import sample
from turbolm.types import Request, SamplingParams, Sequence

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -9.0])
N = 4000


def sequence(
    params: SamplingParams, prompt: tuple[int, ...] = (7,), answer: tuple[int, ...] = (), **options: object
) -> Sequence:
    made = Sequence(Request(str(options.pop("id", "r")), prompt, params, **options))
    made.token_ids += answer
    return made


def draw(params: SamplingParams, **options: object) -> int:
    tokens, _ = Sampler().sample(LOGITS.clone()[None], [Choice(sequence(params, **options))])
    return tokens[0]


def frequencies(count: int = N, **params: object) -> list[float]:
    """How often each token is drawn."""
    options = SamplingParams(**params)
    choices = [Choice(sequence(options, id=f"r{i}")) for i in range(count)]
    tokens, _ = Sampler().sample(LOGITS.repeat(count, 1), choices)
    counts = collections.Counter(tokens)
    return [counts[i] / count for i in range(len(LOGITS))]


def assert_distributed(found: list[float], probs: torch.Tensor) -> None:
    probs = probs / probs.sum()
    for f, p in zip(found, probs.tolist(), strict=True):
        assert f == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / N) + 1e-9)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert {draw(SamplingParams(temperature=0, seed=i)) for i in range(50)} == {0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_shapes_the_distribution(temperature: float) -> None:
    assert_distributed(frequencies(temperature=temperature), torch.softmax(LOGITS / temperature, -1))


def test_top_k_keeps_the_k_likeliest() -> None:
    probs = torch.softmax(LOGITS, -1)
    assert_distributed(frequencies(top_k=3), torch.where(torch.arange(8) < 3, probs, 0))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probs = torch.softmax(LOGITS, -1)  # 0.429 0.260 0.158 …
    assert_distributed(frequencies(top_p=0.6), torch.where(torch.arange(8) < 2, probs, 0))
    assert_distributed(frequencies(top_p=0.7), torch.where(torch.arange(8) < 3, probs, 0))


def test_top_p_is_a_part_of_what_top_k_left() -> None:
    probs = torch.softmax(LOGITS, -1)  # among the best three: 0.507 0.307 0.186
    assert_distributed(frequencies(top_k=3, top_p=0.5), torch.where(torch.arange(8) < 1, probs, 0))
    assert_distributed(frequencies(top_k=3, top_p=0.55), torch.where(torch.arange(8) < 2, probs, 0))


def test_min_p_drops_what_is_unlikely_next_to_the_best() -> None:
    probs = torch.softmax(LOGITS, -1)
    assert_distributed(frequencies(min_p=0.5), torch.where(probs >= 0.5 * probs[0], probs, 0))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 1500), st.floats(0.05, 1.0), st.floats(0, 0.3), st.floats(0.2, 3.0))
def test_filters_on_a_large_vocabulary_equal_a_plain_computation(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5000, generator=generator) * 2
    kept = plain_filters(torch.softmax(logits / temperature, -1), top_k, top_p, min_p)
    uniform = torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64)

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((64,), value, dtype=dtype)

    found = sample(
        logits.repeat(64, 1), column(temperature, torch.float32), column(top_k, torch.int64),
        column(top_p, torch.float32), column(min_p, torch.float32), uniform,
    )  # fmt: skip
    assert set(found.tolist()) <= set(kept.nonzero().squeeze(1).tolist())
    weights = kept.double() / kept.sum()
    upper = weights.cumsum(0)[found]
    rounding = (kept[kept > 0].min() + 2e-5) / kept.sum()  # the last token may be kept or not
    assert (upper - weights[found] - rounding <= uniform).all()
    assert (uniform <= upper + rounding).all()


def plain_filters(probs: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    order = probs.argsort(descending=True)
    kept = order[: top_k or None]
    whole = probs[kept].sum() if top_k else 1.0
    before = (probs[kept] / whole).double().cumsum(0) - probs[kept] / whole
    # a hair more than top_p, so that rounding doesn't decide
    kept = kept[(before < top_p + 1e-5) | (torch.arange(len(kept)) == 0)]
    kept = kept[probs[kept] >= min_p * probs.max() - 1e-9]
    return torch.zeros_like(probs).scatter(0, kept, probs[kept])


def adjusted(
    params: SamplingParams, prompt: tuple[int, ...], answer: tuple[int, ...], **options: object
) -> torch.Tensor:
    """The logits after penalties, biases and bans."""
    logits = LOGITS.clone()[None]
    Sampler().sample(logits, [Choice(sequence(params, prompt, answer, **options))])
    return logits[0]


def test_presence_penalty_is_subtracted_once_from_tokens_of_the_answer() -> None:
    found = adjusted(SamplingParams(presence_penalty=0.5), (0, 1), (1, 1, 2))
    assert torch.equal(found - LOGITS, torch.tensor([0, -0.5, -0.5, 0, 0, 0, 0, 0]))


def test_frequency_penalty_is_subtracted_per_occurrence_in_the_answer() -> None:
    found = adjusted(SamplingParams(frequency_penalty=0.5), (0, 1), (1, 1, 2))
    assert torch.equal(found - LOGITS, torch.tensor([0, -1.0, -0.5, 0, 0, 0, 0, 0]))


def test_repetition_penalty_covers_the_prompt_and_pushes_down_both_signs() -> None:
    found = adjusted(SamplingParams(repetition_penalty=2.0), (0, 6), (1,))
    assert torch.equal(found, torch.tensor([1.0, 0.75, 1.0, 0.5, 0.0, -1.0, -4.0, -9.0]))


def test_penalties_follow_the_answer_as_it_grows() -> None:
    sampler, params = Sampler(), SamplingParams(frequency_penalty=1.0, temperature=0)
    growing = sequence(params)
    for expected in (0, 1, 0, 2, 1):  # each takes a point from its own token
        tokens, _ = sampler.sample(LOGITS.clone()[None], [Choice(growing)])
        growing.token_ids.append(tokens[0])
        assert tokens == [expected]


def test_logit_bias_is_added() -> None:
    assert draw(SamplingParams(temperature=0, logit_bias={7: 100.0})) == 7
    assert draw(SamplingParams(temperature=0, logit_bias={0: -100.0})) == 1


def test_end_and_stop_tokens_wait_for_min_tokens() -> None:
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(1,))
    assert draw(params, eos_token_ids=(0,)) == 2
    assert draw(params, eos_token_ids=(0,), answer=(5, 5)) == 0


def test_ignore_eos_leaves_end_tokens_possible() -> None:
    assert draw(SamplingParams(temperature=0, min_tokens=2, ignore_eos=True), eos_token_ids=(0,)) == 0


def test_bad_words_never_complete() -> None:
    params = SamplingParams(temperature=0)
    words = ((3, 4, 0), (1,))
    assert draw(params, bad_words_ids=words, answer=(3, 4)) == 2  # 0 would complete the first, 1 is the second
    assert draw(params, bad_words_ids=words, answer=(4, 3)) == 0
    assert draw(params, bad_words_ids=words, prompt=(3, 4)) == 0  # only the answer counts


def test_seeds_decide_the_draw_and_positions_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(seed: int | None, sampler: Sampler) -> list[int]:
        params = SamplingParams(seed=seed)
        rows = [Choice(sequence(params, answer=(1,) * n)) for n in range(40)]
        return sampler.sample(LOGITS.repeat(40, 1), rows)[0]

    one, other = Sampler(), Sampler()
    assert answers(1, one) == answers(1, other)
    assert answers(1, one) != answers(2, one)
    assert len(set(answers(1, one))) > 2
    unseeded = answers(None, one)
    monkeypatch.setattr(randomness, "_SALT", b"another run")
    assert answers(None, one) != unseeded
    assert answers(1, one) == answers(1, other)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={3: 50.0})
    tokens, logprobs = Sampler().sample(LOGITS.clone()[None], [Choice(sequence(params))])
    expected = torch.log_softmax(LOGITS, -1)
    entry = logprobs[0]
    assert entry is not None
    assert tokens == [3]
    assert (entry.token_id, entry.rank) == (3, 4)
    assert entry.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in entry.top] == [0, 1]
    assert entry.top[0][1] == pytest.approx(float(expected[0]))


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"seed": 3}, {}),
        ({"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3, "temperature": 0}, {}),
        ({"temperature": 0}, {"bad_words_ids": ((1, 0), (2, 1, 0), (0, 2, 1, 0), (3,))}),
        ({"temperature": 0, "min_tokens": 4, "stop_token_ids": (0,)}, {"eos_token_ids": (1,)}),
    ],
)
def test_a_choice_after_drafts_is_that_after_the_same_tokens(params: dict, options: dict) -> None:
    """Whether a token before is a draft must not matter."""
    tokens, base = (0, 2, 1, 1, 0), SamplingParams(**params)
    known = [Choice(sequence(base, (5, 1), tokens[:n], **options)) for n in range(len(tokens) + 1)]
    drafted = [Choice(sequence(base, (5, 1), (), **options), tokens[:n]) for n in range(len(tokens) + 1)]
    expected, found = LOGITS.repeat(len(known), 1), LOGITS.repeat(len(known), 1)
    sampler = Sampler()
    assert sampler.sample(expected, known) == sampler.sample(found, drafted)
    assert torch.equal(expected, found)
    assert options or "seed" in params or not torch.equal(found, LOGITS.expand_as(found))
    one = Choice(
        sequence(base, (5, 1), tokens[:2], **options), tokens[2:4]
    )  # and what was learned of them is forgotten
    for choice, row in ((one, 4), (one._replace(drafts=()), 2), (one, 4)):
        logits = LOGITS.clone()[None]
        sampler.sample(logits, [choice])
        assert torch.equal(logits[0], expected[row])


def test_rows_without_a_distribution_are_told_apart_from_the_others() -> None:
    logits = torch.stack([LOGITS, LOGITS * math.nan, torch.full_like(LOGITS, -math.inf), LOGITS])
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=1, logprobs=1)
        tokens, logprobs = Sampler().sample(logits.clone(), [Choice(sequence(params)) for _ in range(4)])
        assert tokens[1:3] == [-1, -1]
        assert tokens[0] == tokens[3] >= 0
        assert [entry is None for entry in logprobs] == [False, True, True, False]


def test_steps_with_other_requests_are_drawn_by_their_own_params() -> None:
    """A sampler that has served one set of requests chooses for the next as a new one does."""
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(seed=3, temperature=2.0)
    sampler = Sampler()
    for params in ([greedy], [drawn], [greedy, drawn], [drawn, greedy], [drawn], [greedy]):
        choices = [Choice(sequence(each, answer=(1, 2))) for each in params]
        logits = LOGITS.repeat(len(params), 1)
        assert sampler.sample(logits.clone(), choices)[0] == Sampler().sample(logits.clone(), choices)[0]
