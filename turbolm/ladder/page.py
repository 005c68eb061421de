"""The report as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from turbolm.config import format_size, parse_part
from turbolm.errors import ConfigError
from turbolm.ladder.climb import MEMORY_CONTEXT
from turbolm.ladder.difference import differences
from turbolm.ladder.drawing import Point, bars, flow, kind_of, scatter
from turbolm.ladder.table import shortcomings

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """ConfigError where it can't be written."""
    try:
        path.write_text(render(report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}; give another folder with --out") from None


def render(report: Mapping[str, Any]) -> str:
    """All text of the report is escaped: answers are whatever a model wrote."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = format_size
    environment.filters["percent"] = _percent
    environment.globals["kind_of"] = kind_of
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    rungs = report["rungs"]
    quality = _quality_points(rungs, parse_part(report["settings"]["max_drop"], "max_drop"))
    return template.render(
        report=report,
        rungs=rungs,
        notes=shortcomings(report),
        recommended=next((rung for rung in rungs if rung["name"] == report["recommended"]), None),
        flow=Markup(flow(rungs, report["recommended"])),
        plots=[Markup(plot) for plot in quality],
        groups=_groups(rungs),
        layers=lambda found: Markup(bars(found["divergences"], found["skipped"], "layer")),
        differences=differences,
    )


def _percent(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}%}"


def _groups(rungs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the groups that have scores: the data's, then the probes'."""
    names = {name: score["is_probe"] for rung in rungs for name, score in rung["scores"].items()}
    return sorted(names, key=lambda name: (names[name], name))


def _quality_points(rungs: Sequence[Mapping[str, Any]], max_drop: float) -> list[str]:
    """Plots of the quality kept over memory and over speed; none where only the base was measured."""
    measured = [
        (number, rung)
        for number, rung in enumerate(rungs, 1)
        if rung["cost"] and (number == 1 or (rung["decision"] and rung["decision"]["comparison"]))
    ]
    if len(measured) < 2:
        return []

    def points(cost: str, scale: float) -> list[Point]:
        found = []
        for number, rung in measured:
            drop = rung["decision"]["comparison"] if number > 1 else {"drop": 0.0, "low": 0.0, "high": 0.0}
            found.append(
                Point(
                    label=str(number),
                    title=rung["title"],
                    kind=kind_of(rung["status"]),
                    x=rung["cost"][cost] * scale,
                    y=1 - drop["drop"],
                    low=1 - drop["high"],
                    high=1 - drop["low"],
                )
            )
        return found

    gigabytes = max(rung["cost"]["memory_bytes"] for _, rung in measured) >= 2e9
    unit, scale = ("GB", 1e-9) if gigabytes else ("MB", 1e-6)
    streams = measured[0][1]["cost"]["streams"]
    title = f"{unit} of weights, and KV of {streams} × {MEMORY_CONTEXT:,} tokens"
    return [
        scatter(points("memory_bytes", scale), title, 1 - max_drop, "{:,.1f}" if gigabytes else "{:,.0f}"),
        scatter(points("tokens_per_second_load", 1.0), f"tokens/s, {streams} answers at once", 1 - max_drop),
    ]
