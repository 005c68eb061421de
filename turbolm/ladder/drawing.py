"""The report's drawings as SVG. Colours are CSS classes of the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

_KINDS = {
    "base": "good",
    "accepted": "good",
    "rejected": "bad",
    "not good enough": "bad",
    "too little data": "open",
    "skipped": "off",
    "not served": "off",
}
_WIDTH = 350  # of the flow: a phone's
_BOX_WIDTH, _BOX_HEIGHT, _GAP = 258, 58, 40
_TOP = 8
_EDGE = 14  # of a plot: where marks lie that would be beyond it
_NEAR = 12  # marks closer than this would cover each other
_REACH = 10  # times the allowed drop: how far a plot reaches from the base's quality


def kind_of(status: str) -> str:
    """The CSS class of a verdict."""
    return _KINDS.get(status, "open")


def flow(rungs: Sequence[Mapping[str, Any]], recommended: str | None) -> str:
    """The steps from top to bottom: what was decided at each, and which step a rejected one leads back to."""
    parts = []
    tops = [_TOP + number * (_BOX_HEIGHT + _GAP) for number in range(len(rungs))]
    good = 0  # the last acceptable step so far
    num_back = 0
    for number, rung in enumerate(rungs):
        kind = kind_of(rung["status"])
        parts.append(_box(number, rung, tops[number], rung["name"] == recommended))
        if number + 1 < len(rungs):
            parts.append(_arrow_down(tops[number], _answer(rung["status"]), kind))
        if kind in ("bad", "open") and number:
            parts.append(_arrow_back(tops[number], tops[good], num_back, kind))
            num_back += 1
        if kind == "good":
            good = number
    height = tops[-1] + _BOX_HEIGHT + _TOP
    label = "; ".join(f"step {n}: {r['title']}: {r['status']}" for n, r in enumerate(rungs, 1))
    return (
        f'<svg class="flow" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _answer(status: str) -> str:
    """To the question whether a step is acceptable."""
    known = {"base": "acceptable", "accepted": "acceptable", "rejected": "no: step back"}
    return known.get(status, "not shown: step back" if kind_of(status) == "open" else "")


def _box(number: int, rung: Mapping[str, Any], top: int, is_recommended: bool) -> str:
    kind = kind_of(rung["status"])
    classes = f"box {kind}{' chosen' if is_recommended else ''}"
    mark = '<tspan class="mark"> · recommended</tspan>' if is_recommended else ""
    return (
        f'<rect class="{classes}" x="2" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="9"/>'
        f'<circle class="dot {kind}" cx="26" cy="{top + _BOX_HEIGHT / 2:g}" r="13"/>'
        f'<text class="number" x="26" y="{top + _BOX_HEIGHT / 2 + 4.5:g}">{number + 1}</text>'
        f'<text class="title" x="50" y="{top + 25}">{escape(_short(rung["title"], 27))}</text>'
        f'<text class="status {kind}" x="50" y="{top + 44}">{escape(rung["status"])}{mark}</text>'
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _arrow_down(top: int, answer: str, kind: str) -> str:
    x, start, end = 26, top + _BOX_HEIGHT, top + _BOX_HEIGHT + _GAP
    return (
        f'<path class="arrow" d="M{x} {start + 2}V{end - 9}"/>'
        f'<path class="head" d="M{x - 5} {end - 10}h10l-5 8z"/>'
        f'<text class="answer {kind}" x="{x + 14}" y="{start + _GAP / 2 + 4:g}">{answer}</text>'
    )


def _arrow_back(top: int, target: int, number: int, kind: str) -> str:
    """From a step up to the one that stays, to the right of the boxes."""
    x = _BOX_WIDTH + 2
    out = min(x + 24 + 14 * number, _WIDTH - 6)
    start, end = top + _BOX_HEIGHT / 2 - 8, target + _BOX_HEIGHT / 2 + 8
    return (
        f'<path class="back {kind}" d="M{x + 2} {start:g}H{out - 8}q8 0 8 -8V{end + 8:g}q0 -8 -8 -8H{x + 11}"/>'
        f'<path class="head {kind}" d="M{x + 12} {end - 5:g}v10l-9 -5z"/>'
    )


@dataclass(frozen=True, slots=True)
class Point:
    label: str  # inside the mark
    title: str
    kind: str
    x: float
    y: float
    low: float
    high: float


def scatter(points: Sequence[Point], x_title: str, limit: float, format_x: str = "{:,.0f}") -> str:
    """Quality over a cost: marks with their intervals, and the line of what is acceptable. `y`, `low`, `high` and
    `limit` are parts of the base's quality. What is far beyond the limit lies at the edge, with its value beside it."""
    width, height = 350, 250
    left, right, top, bottom = 52, width - 14, 12, height - 42
    reach = _REACH * (1 - limit)
    low = max(1 - reach, min(limit, *(point.y for point in points), *(point.low for point in points)))
    high = min(1 + reach, max(1.0, *(point.y for point in points), *(point.high for point in points)))
    margin = 0.08 * (high - low)
    low, high = low - margin, high + margin
    x_high = max(1.12 * max(point.x for point in points), 1e-6)  # costs begin at 0

    def at_x(value: float) -> float:
        return round(left + (right - left) * value / x_high, 1)

    def at_y(value: float) -> float:
        clipped = min(max(value, low), high)
        return round(bottom - (bottom - top) * (clipped - low) / (high - low), 1)

    parts = [f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>']
    for tick in ticks(low, high, 5):
        parts.append(f'<path class="grid" d="M{left} {at_y(tick)}H{right}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{at_y(tick) + 4}">{_percent(tick, high - low)}</text>')
    for tick in ticks(0.0, x_high, 4):
        parts.append(f'<text class="tick middle" x="{at_x(tick)}" y="{bottom + 16}">{format_x.format(tick)}</text>')
    parts.append(f'<path class="limit" d="M{left} {at_y(limit)}H{right}"/>')
    parts.append(f'<text class="tick middle" x="{(left + right) / 2:g}" y="{height - 8}">{escape(x_title)}</text>')
    drawn: list[tuple[float, float, Point]] = []
    for point in points:
        is_inside = low <= point.y <= high
        y = at_y(point.y) if is_inside else min(max(at_y(point.y), top + _EDGE), bottom - _EDGE)
        near = next((n for n, (a, b, _) in enumerate(drawn) if math.hypot(at_x(point.x) - a, y - b) < _NEAR), None)
        if near is None:
            drawn.append((at_x(point.x), y, point))
        else:  # it would cover the other: one mark for both
            drawn[near] = (*drawn[near][:2], _joined(drawn[near][2], point))
    for x, y, point in drawn:
        parts += _mark(point, x, y, at_y(point.low), at_y(point.high), low <= point.y <= high)
    label = f"quality over {escape(x_title)}"
    return f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _joined(first: Point, second: Point) -> Point:
    """One mark for two; its colour is that of the worse."""
    kind = max(first.kind, second.kind, key=("good", "off", "open", "bad").index)
    return replace(
        first,
        label=f"{first.label},{second.label}",
        title=f"{first.title}; {second.title}",
        kind=kind,
        low=min(first.low, second.low),
        high=max(first.high, second.high),
    )


def _mark(point: Point, x: float, y: float, low: float, high: float, is_inside: bool) -> list[str]:
    title = f"<title>{escape(point.title)}: {point.y:.2%}</title>"
    half = 9 + 5 * point.label.count(",")
    parts = [
        f'<path class="interval {point.kind}" d="M{x} {low}V{high}"/>',
        f'<rect class="dot {point.kind}" x="{x - half:g}" y="{y - 9:g}" width="{2 * half}" height="18" rx="9">'
        f"{title}</rect>",
        f'<text class="number small" x="{x}" y="{y + 3.5:g}">{escape(point.label)}</text>',
    ]
    if not is_inside:
        parts.append(f'<text class="tick end" x="{x - half - 4:g}" y="{y + 4:g}">{point.y:.0%}</text>')
    return parts


def bars(values: Sequence[float], marked: Sequence[int], title: str) -> str:
    """A bar for each of the layers; the marked ones stand out. The highest has its value above it."""
    width, height = 350, 150
    left, right, top, bottom = 14, width - 14, 26, height - 38
    highest = max(*values, 1e-12)
    step = (right - left) / len(values)
    parts = [f'<path class="axis" d="M{left} {bottom}H{right}"/>']
    for number, value in enumerate(values):
        x, size = left + step * number, max(1.0, (bottom - top) * value / highest)
        kind = "kept" if number in marked else "rest"
        parts.append(
            f'<rect class="bar {kind}" x="{x + 0.12 * step:.1f}" y="{bottom - size:.1f}" width="{0.76 * step:.1f}" '
            f'height="{size:.1f}"><title>layer {number}: {value:.4f}</title></rect>'
        )
        if number % max(1, -(-len(values) // 8)) == 0:
            parts.append(f'<text class="tick middle" x="{x + step / 2:.1f}" y="{bottom + 15}">{number}</text>')
    place = min(max(left + step * (values.index(max(values)) + 0.5), left + 20), right - 20)
    parts.append(f'<text class="tick middle" x="{place:.1f}" y="{top - 8}">{max(values):.4f}</text>')
    parts.append(f'<text class="tick middle" x="{(left + right) / 2:g}" y="{height - 6}">{escape(title)}</text>')
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count + 1e-9), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _percent(value: float, span: float) -> str:
    return f"{value:.{2 if span < 0.02 else 1 if span < 0.1 else 0}%}"
