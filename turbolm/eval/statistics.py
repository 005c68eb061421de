"""Is a change worse than the base by more than is allowed? Paired statistics over the same items.

The drop is relative: 1 - mean(changed) / mean(base). Its bounds come from the Bayesian bootstrap (random weights of
the items, exponential before they are normalized) with one further item at the worst end: one that the base solves and
the change doesn't for the upper bound, the reverse for the lower. For pass/fail scores without wins the upper bound is
that of Clopper and Pearson, so that a few items without any loss prove little: 0 of n leaves 1 - 0.05^(1/n).
Source: Rubin, The Bayesian Bootstrap, 1981; Learned-Miller and Thomas, A New Confidence Interval for the Mean of a
Bounded Random Variable, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["accepted", "rejected", "too little data"]
Array = NDArray[np.float64]

CONFIDENCE = 0.95  # of each of the two bounds
MIN_UNBOUNDED = 12  # items, below which nothing is said about measures without a worst end
_RESAMPLES = 4000
_MAX_ITEMS = 1_000_000  # beyond which more data isn't called for


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of two runs over the same items. `drop`, `low` and `high` are parts of the base's mean: 0.01 is 1%."""

    num_items: int
    base_mean: float
    changed_mean: float
    wins: int  # items that the change does better
    losses: int
    ties: int
    drop: float
    low: float  # the true drop is above this, with 95% confidence
    high: float  # and below this
    p_value: float  # sign test: wins and losses this uneven, or more, by chance alone


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    comparison: Comparison | None  # None without items, or where the base's mean is 0


def decide(base: Sequence[float], changed: Sequence[float], max_drop: float, *, bounded: bool = True) -> Decision:
    """Whether `changed` loses no more than `max_drop` (0.01: 1%) of the base's mean. Accepted where the drop's
    upper bound is within it, rejected where the lower bound exceeds it, else there are too few items.

    `base`, `changed`: scores of the same items, in order, 0 or more; higher is better. `bounded`: they are from 0 to
    1, and an item not seen may have any of them; otherwise the worst item seen stands for those not seen.
    """
    pairs = _pairs(base, changed)
    if not len(pairs) or pairs[:, 0].sum() <= 0:
        return Decision("too little data", None)
    comparison = compare(base, changed, bounded=bounded)
    enough = bounded or comparison.num_items >= MIN_UNBOUNDED
    if enough and comparison.high <= max_drop:
        return Decision("accepted", comparison)
    if enough and comparison.low > max_drop:
        return Decision("rejected", comparison)
    return Decision("too little data", comparison)


def compare(base: Sequence[float], changed: Sequence[float], *, bounded: bool = True) -> Comparison:
    """As `decide`, without a limit. The base's mean must be above 0."""
    pairs = _pairs(base, changed)
    low, high = _bounds(pairs, 1.0, bounded)
    wins, losses = int((pairs[:, 1] > pairs[:, 0]).sum()), int((pairs[:, 1] < pairs[:, 0]).sum())
    base_mean, changed_mean = (float(value) for value in pairs.mean(axis=0))
    return Comparison(
        num_items=len(pairs),
        base_mean=base_mean,
        changed_mean=changed_mean,
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        drop=1 - changed_mean / base_mean,
        low=low,
        high=high,
        p_value=sign_test(wins, losses),
    )


def num_needed(base: Sequence[float], changed: Sequence[float], max_drop: float, *, bounded: bool = True) -> int | None:
    """How many items would decide, if further ones were like these. None: no number would, since the drop is at the
    limit, or the base solves nothing."""
    pairs = _pairs(base, changed)
    if not len(pairs) or pairs[:, 0].sum() <= 0:
        return None
    is_within = 1 - pairs[:, 1].sum() / pairs[:, 0].sum() <= max_drop

    def decides(count: int) -> bool:
        low, high = _bounds(pairs, count / len(pairs), bounded)
        return high <= max_drop if is_within else low > max_drop

    low = high = max(len(pairs), 1 if bounded else MIN_UNBOUNDED)
    while not decides(high):
        low, high = high, 2 * high
        if high > _MAX_ITEMS:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of as uneven a split as this if wins and losses are equally likely. For pass/fail
    scores this is McNemar's exact test."""
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << total))


def mean_bounds(scores: Sequence[float]) -> tuple[float, float]:
    """Bounds of the true mean of scores from 0 to 1, with 95% confidence each."""
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    return (
        float(np.quantile(_weighted_mean(values, counts, 0.0), 1 - CONFIDENCE)),
        float(np.quantile(_weighted_mean(values, counts, 1.0), CONFIDENCE)),
    )


def _weighted_mean(values: Array, counts: NDArray[np.int64], extra: float) -> Array:
    weights = _weights(np.append(counts, 1).astype(np.float64))
    means: Array = weights @ np.append(values, extra) / weights.sum(axis=1)
    return means


def _pairs(base: Sequence[float], changed: Sequence[float]) -> Array:
    """[n, 2]: base, changed."""
    assert len(base) == len(changed), "scores of the same items"
    return np.stack([np.asarray(base, dtype=np.float64), np.asarray(changed, dtype=np.float64)], axis=1)


def _bounds(pairs: Array, scale: float, bounded: bool) -> tuple[float, float]:
    """The drop's bounds if there were `scale` times as many items like these."""
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    if bounded:
        worst, best = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    else:
        gains = unique[:, 1] - unique[:, 0]
        worst, best = unique[gains.argmin()], unique[gains.argmax()]
    weights = _weights(np.append(counts * scale, 1.0))
    low = _drops(weights, np.vstack([unique, best]))
    high = _drops(weights, np.vstack([unique, worst]))
    return float(np.quantile(low, 1 - CONFIDENCE)), float(np.quantile(high, CONFIDENCE))


def _weights(shapes: Array) -> Array:
    """[resamples, len(shapes)]: the summed weights of so many equal items each. Seeded: the same data always give
    the same bounds."""
    return np.random.default_rng(0).standard_gamma(shapes, size=(_RESAMPLES, len(shapes)))


def _drops(weights: Array, pairs: Array) -> Array:
    sums = weights @ pairs
    # Weights may leave the base with nearly nothing; then what the change has beyond it counts as a gain of all.
    drops: Array = np.clip(1 - sums[:, 1] / np.maximum(sums[:, 0], 1e-12), -1e6, 1.0)
    return drops
