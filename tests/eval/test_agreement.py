from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.eval.agreement import agreement, distributions, fidelity, first_divergence
from turbolm.eval.answer import Agreement, Answer, Distributions
from turbolm.eval.checks import ToolCall
from turbolm.types import TokenLogprob


def likeliest(rows: np.ndarray, count: int) -> Distributions:
    """The likeliest tokens of whole distributions [t, v]."""
    ids = np.argsort(-rows, axis=1)[:, :count].astype(np.int32)
    return Distributions(ids, np.log(np.take_along_axis(rows, ids, 1)).astype(np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


def test_divergence_of_whole_distributions_is_exact() -> None:
    rng = np.random.default_rng(0)
    base, changed = softmax(rng.normal(size=(6, 12))), softmax(rng.normal(size=(6, 12)))
    found = agreement(likeliest(base, 12), likeliest(changed, 12))
    assert found is not None
    assert found.kl == pytest.approx(float((base * np.log(base / changed)).sum(axis=1).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float((base.argmax(1) == changed.argmax(1)).mean()))


@given(st.integers(0, 1000), st.floats(0.01, 3.0))
def test_divergence_of_the_likeliest_tokens_is_a_lower_bound(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(3, 50))
    base, changed = softmax(logits), softmax(logits + rng.normal(scale=noise, size=logits.shape))
    found = agreement(likeliest(base, 8), likeliest(changed, 8))
    assert found is not None
    assert 0 <= found.kl <= float((base * np.log(base / changed)).sum(axis=1).mean()) + 1e-5


def test_equal_runs_agree_wholly() -> None:
    rows = likeliest(softmax(np.random.default_rng(0).normal(size=(4, 30))), 10)
    assert agreement(rows, rows) == Agreement(0.0, 1.0)
    assert agreement(rows, Distributions(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))) is None


def test_what_is_not_a_number_agrees_with_nothing() -> None:
    rows = likeliest(softmax(np.random.default_rng(0).normal(size=(4, 30))), 10)
    broken = Distributions(rows.token_ids, np.full_like(rows.logprobs, np.nan))
    assert fidelity(Answer(), Answer(agreement=agreement(rows, broken))) == pytest.approx(0, abs=1e-20)


def test_distributions_survive_storage() -> None:
    entries = [None, TokenLogprob(5, -0.1, 1, ((5, -0.1), (7, -2.5))), TokenLogprob(9, -4.0, 3, ((1, -0.2), (5, -3.0)))]
    found = distributions(entries)
    again = Distributions.from_bytes(found.to_bytes())
    assert again.token_ids.tolist() == [[5, 7], [1, 5]]
    assert again.logprobs.tolist() == found.logprobs.tolist()


@pytest.mark.parametrize(
    ("a", "b", "place"), [((1, 2), (1, 2), None), ((1, 2, 3), (1, 5, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)]
)
def test_first_divergence(a: tuple[int, ...], b: tuple[int, ...], place: int | None) -> None:
    assert first_divergence(Answer(token_ids=a), Answer(token_ids=b)) == place


def test_fidelity() -> None:
    assert fidelity(Answer(), Answer(agreement=Agreement(kl=0.1, top1=1.0))) == pytest.approx(math.exp(-0.1))
    text = [Answer(log_likelihoods=(value,)) for value in (-2.0, -2.5, -1.9)]
    assert fidelity(text[0], text[1]) == pytest.approx(math.exp(-2.0) ** -1 * math.exp(-2.5))
    assert fidelity(text[0], text[2]) > 1
    choices = [Answer(log_likelihoods=values) for values in ((-1.0, -2.0), (-11.0, -12.0), (-2.0, -1.0))]
    assert fidelity(choices[0], choices[1]) == pytest.approx(1)  # the same preference
    assert fidelity(choices[0], choices[2]) < 0.7
    assert fidelity(Answer(), Answer(error="broken")) == 0
    assert fidelity(Answer(), Answer()) is None


def test_an_answer_survives_storage() -> None:
    answer = Answer(
        text="a “b” 你", tool_calls=(ToolCall("f", "{}"),), token_ids=(1, 2), prompt_tokens=3, finish_reason="stop",
        score=0.5, note="n", log_likelihoods=(-0.25,), agreement=Agreement(0.5, 0.75),
    )  # fmt: skip
    assert Answer.from_json(answer.to_json()) == answer
    assert Answer.from_json(Answer(error="x").to_json()) == Answer(error="x")
    assert answer.shown == "a “b” 你\nf({})"
