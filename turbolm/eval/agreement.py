"""How far two runs agree where there is no reference: on the text, and on the distributions behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from turbolm.eval.answer import Agreement, Answer, Distributions
from turbolm.types import TokenLogprob

NUM_TOP = 20  # likeliest tokens that distributions keep
_LEAST = 1e-6  # probability: less is rounding
_LOST = 100.0  # nats: a distribution that isn't numbers


def distributions(entries: Sequence[TokenLogprob | None]) -> Distributions:
    """Of the positions that have one."""
    tops = [entry.top for entry in entries if entry is not None]
    width = min((len(top) for top in tops), default=0)
    ids = np.array([[token for token, _ in top[:width]] for top in tops], np.int32).reshape(len(tops), width)
    values = np.array([[value for _, value in top[:width]] for top in tops], np.float32).reshape(len(tops), width)
    return Distributions(ids, values)


def agreement(base: Distributions, changed: Distributions) -> Agreement | None:
    """Over the positions that both have; None: there are none."""
    count = min(len(base.token_ids), len(changed.token_ids))
    if not count or not base.token_ids.shape[1] or not changed.token_ids.shape[1]:
        return None
    divergences = [_divergence(base, changed, position) for position in range(count)]
    same = base.token_ids[:count, 0] == changed.token_ids[:count, 0]
    return Agreement(kl=math.fsum(divergences) / count, top1=float(same.mean()))


def _divergence(base: Distributions, changed: Distributions, position: int) -> float:
    """The least Kullback-Leibler divergence that the two lists of likeliest tokens allow. What isn't in the changed
    model's list is no likelier than the last that is; beyond that, the tokens in neither list count as one."""
    ours = dict(zip(base.token_ids[position].tolist(), base.logprobs[position].tolist(), strict=True))
    theirs = dict(zip(changed.token_ids[position].tolist(), changed.logprobs[position].tolist(), strict=True))
    total, rest_ours, rest_theirs = 0.0, 1.0, 1.0
    for token in ours.keys() & theirs.keys():
        p, q = math.exp(ours[token]), math.exp(theirs[token])
        rest_ours, rest_theirs = rest_ours - p, rest_theirs - q
        if p > 0 and q > 0:
            total += p * (ours[token] - theirs[token])
    cap = math.exp(min(theirs.values()))
    for p in sorted((math.exp(ours[token]) for token in ours.keys() - theirs.keys()), reverse=True):
        if p * rest_theirs <= cap * rest_ours or p <= 0:
            break
        total += p * math.log(p / max(cap, _LEAST))
        rest_ours, rest_theirs = rest_ours - p, rest_theirs - cap
    if rest_ours > _LEAST:
        total += rest_ours * math.log(rest_ours / max(rest_theirs, _LEAST))
    return max(total, 0.0) if math.isfinite(total) else _LOST


def first_divergence(base: Answer, changed: Answer) -> int | None:
    """The number of tokens that two answers begin with in common; None: they are equal."""
    if base.token_ids == changed.token_ids:
        return None
    pairs = enumerate(zip(base.token_ids, changed.token_ids, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(base.token_ids), len(changed.token_ids)))


def fidelity(base: Answer, changed: Answer) -> float | None:
    """How much of the base's behaviour is kept, 1: all of it. Of an answer exp(-divergence); of a text the ratio of
    perplexities, which may exceed 1; of choices exp(-divergence of the distributions over them). None: nothing to
    compare."""
    if changed.error is not None:
        return 0.0 if base.error is None else None
    if changed.agreement is not None:
        return math.exp(-changed.agreement.kl)
    if not base.log_likelihoods or not changed.log_likelihoods:
        return None
    if len(base.log_likelihoods) == 1:
        gain = changed.log_likelihoods[0] - base.log_likelihoods[0]
        return math.exp(min(gain, 1.0)) if math.isfinite(gain) else 0.0
    ours, theirs = _normalized(base.log_likelihoods), _normalized(changed.log_likelihoods)
    return math.exp(-max(0.0, math.fsum(math.exp(p) * (p - q) for p, q in zip(ours, theirs, strict=True))))


def _normalized(log_likelihoods: Sequence[float]) -> list[float]:
    highest = max(log_likelihoods)
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in log_likelihoods))
    return [value - total for value in log_likelihoods]
