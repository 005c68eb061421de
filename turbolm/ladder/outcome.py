"""What the answers of a rung say, beside the base's: scores, agreement, and the decision."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from turbolm.eval.agreement import fidelity, first_divergence
from turbolm.eval.answer import Answer
from turbolm.eval.data import Item
from turbolm.eval.statistics import Comparison, Decision, decide, mean_bounds, num_needed
from turbolm.ladder.config import Metric

Status = Literal["base", "not good enough", "accepted", "rejected", "too little data", "skipped", "not served"]
Answers = Mapping[str, Answer]


@dataclass(frozen=True, slots=True)
class GroupScore:
    """The mean score of a group's items, and its bounds with 95% confidence each."""

    num_items: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class AgreementSummary:
    """With the base, over all items that it can be measured on."""

    num_items: int
    fidelity: float  # mean of exp(-KL), and of ratios of perplexities
    kl: float | None  # mean over answers of the mean per token, in nats
    top1: float | None
    num_identical: int  # answers equal token by token
    num_answers: int
    median_divergence: float | None  # tokens in common, of the answers that differ


@dataclass(frozen=True, slots=True)
class Outcome:
    status: Status
    reason: str
    metric: str = ""
    decision: Decision | None = None
    probes: Decision | None = None
    agreement: AgreementSummary | None = None


def group_scores(items: Sequence[Item], answers: Answers) -> dict[str, GroupScore]:
    """By group, of the items that have a check."""
    groups: dict[str, list[float]] = {}
    for item in items:
        answer = answers.get(item.key)
        if answer is not None and answer.score is not None:
            groups.setdefault(item.group, []).append(answer.score)
    return {name: GroupScore(len(own), statistics.fmean(own), *mean_bounds(own)) for name, own in groups.items()}


def mean_score(items: Sequence[Item], answers: Answers) -> float | None:
    """Of the deciding items that have a check."""
    found = [answers[item.key].score for item in deciding(items) if item.key in answers]
    scores = [score for score in found if score is not None]
    return statistics.fmean(scores) if scores else None


def deciding(items: Sequence[Item]) -> list[Item]:
    """The user's own items; where there are none, the probes."""
    return [item for item in items if not item.is_probe] or list(items)


def judge(items: Sequence[Item], base: Answers, changed: Answers, max_drop: float, metric: Metric) -> Outcome:
    """Whether a rung is acceptable. The user's items decide; probes can only show that it isn't."""
    common = [item for item in items if item.key in base and item.key in changed]
    main = deciding(common)
    probes = [item for item in common if item.is_probe and item not in main]
    num_checked = sum(item.check is not None for item in main)
    by_score = metric == "score" or (metric == "auto" and num_checked > 0 and 2 * num_checked >= len(main))
    ours, theirs = (_scores if by_score else _fidelities)(main, base, changed)
    decision = decide(ours, theirs, max_drop, bounded=by_score)
    status: Status = decision.verdict
    reason = explain(decision, max_drop, by_score=by_score)
    if status == "too little data" and decision.comparison is not None:
        reason += _needed(num_needed(ours, theirs, max_drop, bounded=by_score))
    probed = decide(*_scores(probes, base, changed), max_drop) if probes else None
    if status != "rejected" and probed is not None and probed.verdict == "rejected":
        status, reason = "rejected", f"probes: {explain(probed, max_drop, by_score=True)}"
    summary = _agreement(common, base, changed)
    return Outcome(status, reason, "score" if by_score else "agreement", decision, probed, summary)


def _scores(items: Sequence[Item], base: Answers, changed: Answers) -> tuple[list[float], list[float]]:
    pairs = [(base[item.key].score, changed[item.key].score) for item in items]
    known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return [ours for ours, _ in known], [theirs for _, theirs in known]


def _fidelities(items: Sequence[Item], base: Answers, changed: Answers) -> tuple[list[float], list[float]]:
    found = [fidelity(base[item.key], changed[item.key]) for item in items]
    values = [value for value in found if value is not None]
    return [1.0] * len(values), values


def explain(decision: Decision, max_drop: float, *, by_score: bool) -> str:
    """One line."""
    found = decision.comparison
    if found is None and by_score:
        return "the base solves none of the items, so nothing can get worse: give easier ones, or --metric agreement"
    if found is None:
        return "no item says anything about agreement"
    what = "score" if by_score else "agreement"
    text = f"{what} {_change(found)} over {found.num_items} items; with 95% confidence "
    if decision.verdict == "accepted":
        return f"{text}it loses at most {max(found.high, 0):.2%}, within {max_drop:.2%}"
    if decision.verdict == "rejected":
        return f"{text}it loses at least {found.low:.2%}, more than {max_drop:.2%}"
    return f"{text}it loses {max(found.low, 0):.2%} to {max(found.high, 0):.2%}, which doesn't settle {max_drop:.2%}"


def _needed(number: int | None) -> str:
    if number is None:
        return "; the drop is so near the limit that no number of items would"
    return f"; about {number:,} items like these would"


def _change(found: Comparison) -> str:
    if found.drop == 0:
        return "unchanged"
    return f"{abs(found.drop):.2%} {'below' if found.drop > 0 else 'above'} the base's"


def _agreement(items: Sequence[Item], base: Answers, changed: Answers) -> AgreementSummary | None:
    pairs = [(base[item.key], changed[item.key]) for item in items]
    kept = [value for ours, theirs in pairs if (value := fidelity(ours, theirs)) is not None]
    if not kept:
        return None
    measured = [theirs.agreement for _, theirs in pairs if theirs.agreement is not None]
    answered = [(ours, theirs) for ours, theirs in pairs if ours.token_ids]
    divergences = [place for ours, theirs in answered if (place := first_divergence(ours, theirs)) is not None]
    return AgreementSummary(
        num_items=len(kept),
        fidelity=statistics.fmean(kept),
        kl=statistics.fmean(own.kl for own in measured) if measured else None,
        top1=statistics.fmean(own.top1 for own in measured) if measured else None,
        num_identical=len(answered) - len(divergences),
        num_answers=len(answered),
        median_divergence=statistics.median(divergences) if divergences else None,
    )
