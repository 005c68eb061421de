"""The report in the terminal, and the progress of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from turbolm.config import format_size
from turbolm.ladder.rungs import Rung

_STYLES = {"accepted": "green", "base": "", "rejected": "red", "not good enough": "red"}


class TerminalWatch:
    """Shows progress on standard error: a bar with the time left on a terminal, lines elsewhere."""

    def __init__(self, num_rungs: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._is_live = sys.stderr.isatty()
        self._num_rungs = num_rungs
        self._number = 0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        # One count over all rungs, so that the time left is that of the whole run.
        self._task = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> TerminalWatch:
        if self._is_live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, rung: Rung, num_items: int, num_done: int) -> None:
        self._number += 1
        total = num_items * self._num_rungs
        completed = num_items * (self._number - 1) + num_done
        self._bar.update(self._task, description=rung.title, total=total, completed=completed, visible=True)
        known = f", {num_done} of them known" if num_done else ""
        self.say(f"{rung.title}: {num_items} items{known}")

    def advance(self) -> None:
        self._bar.advance(self._task)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def print_report(report: Mapping[str, Any]) -> None:
    """The table, the reasons, the recommendation and its command, on standard output."""
    # Piped to another program, rows stay whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    data = report["data"]
    console.print(
        f"{report['model']['name']}: {data['num_items']} items, {data['num_probes']} probes", markup=False, style="bold"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("rung")
    table.add_column("verdict")
    for column in ("drop", "won/lost/tied", "KL", "weights", "KV/token", "first token", "tokens/s", "under load"):
        table.add_column(column, justify="right")
    for rung in report["rungs"]:
        style = _STYLES.get(rung["status"], "yellow")
        table.add_row(rung["title"], f"[{style}]{rung['status']}[/]" if style else rung["status"], *_figures(rung))
    console.print(table)
    for rung in report["rungs"]:
        console.print(f"\n{rung['title']}: {rung['reason']}", markup=False, soft_wrap=True)
    for line in (*shortcomings(report), recommendation(report)):
        console.print(f"\n{line}", markup=False, soft_wrap=True)


def shortcomings(report: Mapping[str, Any]) -> list[str]:
    """What wasn't asked, and why."""
    lines = []
    data = report["data"]
    if data["problems"]:
        first = ", ".join(f"line {p['line']}" if p["line"] else "a probe" for p in data["problems"][:5])
        lines.append(f"{len(data['problems'])} items were left out ({first}): {data['problems'][0]['message']}")
    if data["num_unasked"]:
        lines.append(f"{data['num_unasked']} items weren't asked, since the budget was used up")
    return lines


def recommendation(report: Mapping[str, Any]) -> str:
    """And the command that follows it."""
    if report["serve"] is None:
        return "Recommended: a larger model, or fine-tuning of this one; its answers aren't good enough"
    title = next(rung["title"] for rung in report["rungs"] if rung["name"] == report["recommended"])
    return f"Recommended: {title}\n  {report['serve']['command']}"


def _figures(rung: Mapping[str, Any]) -> list[str]:
    decision, agreement, cost = rung["decision"], rung["agreement"], rung["cost"]
    found = decision and decision["comparison"]
    figures = [
        f"{found['drop']:.2%} ({found['low']:.2%} to {found['high']:.2%})" if found else "",
        # Agreement with itself can't be beaten: there losing says nothing.
        f"{found['wins']}/{found['losses']}/{found['ties']}" if found and rung["metric"] == "score" else "",
        f"{agreement['kl']:.4f}" if agreement and agreement["kl"] is not None else "",
    ]
    if cost is None:
        return [*figures, *[""] * 5]
    return [
        *figures,
        format_size(cost["weight_bytes"]),
        format_size(cost["kv_bytes_per_token"]),
        f"{1000 * cost['first_token_seconds']:.0f} ms",
        f"{cost['tokens_per_second']:.1f}",
        f"{cost['tokens_per_second_load']:.0f} at {cost['streams']}",
    ]
