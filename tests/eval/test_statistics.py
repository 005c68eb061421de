"""The verdicts: right as often as they say, and sparing with certainty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.eval.statistics import compare, decide, mean_bounds, num_needed, sign_test

NUM_SETS = 200
scores = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30
)


def answered(rng: np.random.Generator, difficulty: np.ndarray) -> list[float]:
    """One run over items that are solved with these probabilities."""
    return (rng.random(len(difficulty)) < difficulty).astype(float).tolist()


@pytest.mark.parametrize("num_items", [20, 100, 300])
def test_a_rung_like_the_base_is_rarely_called_worse(num_items: int) -> None:
    """Both runs draw each item's answer with the same probability: all differences are chance."""
    rng = np.random.default_rng(num_items)
    rejected = 0
    for _ in range(NUM_SETS):
        difficulty = rng.beta(2, 1, num_items)
        rejected += decide(answered(rng, difficulty), answered(rng, difficulty), 0.01).verdict == "rejected"
    assert rejected / NUM_SETS <= 0.05


def test_a_rung_at_the_limit_is_rarely_accepted() -> None:
    """The true drop is slightly more than what is allowed."""
    rng = np.random.default_rng(1)
    accepted = 0
    for _ in range(NUM_SETS):
        base = np.ones(400)
        accepted += decide(base.tolist(), answered(rng, 0.889 * base), 0.11).verdict == "accepted"
    assert accepted / NUM_SETS <= 0.06


def test_a_bad_rung_is_rejected_by_few_items() -> None:
    decision = decide([1.0] * 40, [1.0] * 28 + [0.0] * 12, 0.01)
    assert decision.verdict == "rejected"
    assert decision.comparison is not None
    assert (decision.comparison.wins, decision.comparison.losses, decision.comparison.ties) == (0, 12, 28)
    assert decision.comparison.drop == pytest.approx(0.3)
    assert decision.comparison.low > 0.01


def test_equal_answers_to_few_items_prove_little() -> None:
    """Rule of three: without a loss in n items, up to 3/n may be lost."""
    decision = decide([1.0] * 50, [1.0] * 50, 0.01)
    assert decision.verdict == "too little data"
    assert decision.comparison is not None
    assert decision.comparison.high == pytest.approx(1 - 0.05 ** (1 / 50), rel=0.05)
    needed = num_needed([1.0] * 50, [1.0] * 50, 0.01) or 0
    assert needed == pytest.approx(math.log(0.05) / math.log(0.99), rel=0.1)
    assert decide([1.0] * needed, [1.0] * needed, 0.01).verdict == "accepted"


def test_more_data_are_needed_where_the_base_solves_half() -> None:
    scores = [[1.0] * n + [0.0] * (50 - n) for n in (50, 25)]
    needed = [num_needed(own, own, 0.01) for own in scores]
    assert needed[1] == pytest.approx(2 * (needed[0] or 0), rel=0.1)


def test_no_number_of_items_decides_at_the_limit() -> None:
    assert num_needed([1.0] * 100, [1.0] * 99 + [0.0], 0.01) is None


@pytest.mark.parametrize(("base", "changed"), [([], []), ([0.0] * 30, [1.0] * 30)])
def test_nothing_to_lose(base: list[float], changed: list[float]) -> None:
    decision = decide(base, changed, 0.01)
    assert (decision.verdict, decision.comparison) == ("too little data", None)
    assert num_needed(base, changed, 0.01) is None


def test_agreement_is_decided_by_the_worst_item_seen() -> None:
    assert decide([1.0] * 20, [0.998] * 20, 0.01, bounded=False).verdict == "accepted"
    assert decide([1.0] * 20, [0.95] * 20, 0.01, bounded=False).verdict == "rejected"
    assert decide([1.0] * 20, [0.998] * 14 + [0.5] * 6, 0.01, bounded=False).verdict == "rejected"
    assert decide([1.0] * 5, [1.0] * 5, 0.01, bounded=False).verdict == "too little data"
    assert num_needed([1.0] * 5, [1.0] * 5, 0.01, bounded=False) == 12


@given(scores)
@settings(max_examples=60, deadline=None)
def test_bounds_enclose_the_drop(pairs: list[tuple[float, float]]) -> None:
    base, changed = [a for a, _ in pairs], [b for _, b in pairs]
    if sum(base) == 0:
        return
    found = compare(base, changed)
    assert found.low <= found.drop <= found.high
    assert found.wins + found.losses + found.ties == found.num_items == len(pairs)
    assert decide(base, changed, 0.1) == decide(base[::-1], changed[::-1], 0.1)  # the order of items says nothing


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 2 / 32), (1, 5, 14 / 64), (5, 5, 1.0), (0, 10, 2 / 1024)],
)
def test_sign_test_is_exact(wins: int, losses: int, p_value: float) -> None:
    assert sign_test(wins, losses) == sign_test(losses, wins) == pytest.approx(p_value)


def test_sign_test_of_many_items() -> None:
    assert 0 < sign_test(400, 600) < 1e-9


@pytest.mark.parametrize(("solved", "total"), [(0, 10), (7, 10), (95, 100)])
def test_mean_bounds_are_those_of_clopper_and_pearson(solved: int, total: int) -> None:
    """At the upper bound, as few solved items or fewer have a probability of 5%."""
    low, high = mean_bounds([1.0] * solved + [0.0] * (total - solved))
    tail = sum(math.comb(total, k) * high**k * (1 - high) ** (total - k) for k in range(solved + 1))
    assert tail == pytest.approx(0.05, abs=0.01)
    assert low <= solved / total <= high
