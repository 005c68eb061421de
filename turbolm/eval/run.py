"""`turbolm eval`, once its options are read."""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError
from turbolm.eval.answer import Answer
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import Item, Problem, keeps_going, read_items, report_problems
from turbolm.eval.examination import ExamOptions, examine, prepare
from turbolm.eval.probes import PROBES, make_probes
from turbolm.eval.statistics import mean_bounds
from turbolm.llm import AsyncLLM


def run(model: str, data: str | None, config: ExamConfig, engine: EngineConfig) -> dict[str, Any]:
    """Asks, prints the table, and returns scores and answers as a JSON value. UserError or CapacityError for what
    can't be used."""
    items: list[Item] = []
    problems: list[Problem] = []
    if data is not None:
        items, problems = read_items(data, allow_code=config.allow_code)
        report_problems(problems, keep_going=config.keep_going)
    items += make_probes(tuple(PROBES), config.probes, config.seed, config.probe_words)
    if not items:
        raise ConfigError("there is nothing to ask: give --data, or --probes above 0")
    exam = ExamOptions(config.max_tokens, config.judge())
    answers, left_out = asyncio.run(_ask(model, engine, items, exam, config.keep_going or keeps_going(data)))
    scores = scores_of(items, answers)
    _print(scores, [*problems, *left_out])
    known = [item for item in items if item.key in answers]
    rows = [{"id": item.id, "line": item.line, "group": item.group, **asdict(answers[item.key])} for item in known]
    return {"model": model, "data": data, "settings": asdict(config), "scores": scores, "answers": rows}


async def _ask(
    model: str, engine: EngineConfig, items: Sequence[Item], exam: ExamOptions, keep_going: bool
) -> tuple[dict[str, Answer], list[Problem]]:
    """Answers by item key, and the items that the model can't take."""
    async with AsyncLLM(model, engine) as llm:
        questions, reasons = prepare(llm, items, exam)
        problems = [Problem(item.line, reasons[item.key]) for item in items if item.key in reasons]
        report_problems([problem for problem in problems if problem.line], keep_going=keep_going)
        answers: dict[str, Answer] = {}
        columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=len(questions))
            async with aclosing(examine(llm, questions, exam, references={})) as found:
                async for item, answer, _ in found:
                    answers[item.key] = answer
                    bar.advance(task)
        return answers, problems


def scores_of(items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, Any]:
    """By group: items, mean score and its bounds; of texts the perplexity."""
    groups: dict[str, list[Answer]] = {}
    for item in items:
        if item.key in answers:
            groups.setdefault(item.group, []).append(answers[item.key])
    rows: dict[str, Any] = {}
    for name, own in groups.items():
        scores = [answer.score for answer in own if answer.score is not None]
        texts = [answer.log_likelihoods[0] for answer in own if len(answer.log_likelihoods) == 1]
        low, high = mean_bounds(scores) if scores else (None, None)
        rows[name] = {
            "num_items": len(own),
            "num_errors": sum(answer.error is not None for answer in own),
            "mean": statistics.fmean(scores) if scores else None,
            "low": low,
            "high": high,
            "perplexity": math.exp(-statistics.fmean(texts)) if texts else None,
        }
    return rows


def _print(scores: Mapping[str, Any], left_out: Sequence[Problem]) -> None:
    # Piped to another program, rows stay whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("group")
    for column in ("items", "score", "true mean, 95% each", "perplexity", "errors"):
        table.add_column(column, justify="right")
    for name, row in scores.items():
        table.add_row(
            name,
            str(row["num_items"]),
            "" if row["mean"] is None else f"{row['mean']:.1%}",
            "" if row["mean"] is None else f"{row['low']:.1%} to {row['high']:.1%}",
            "" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
            str(row["num_errors"] or ""),
        )
    console.print(table)
    if left_out:
        console.print(f"\n{len(left_out)} items were left out: {left_out[0]}", markup=False, soft_wrap=True)
