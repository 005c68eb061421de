"""The report of a run, as JSON: what was found, and everything needed to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from turbolm.bench.record import machine, write_record
from turbolm.config import EngineConfig
from turbolm.eval.answer import Answer
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import Item
from turbolm.ladder.climb import MEMORY_CONTEXT, Climb, Step
from turbolm.ladder.config import LadderConfig
from turbolm.ladder.outcome import group_scores
from turbolm.ladder.recommendation import FORMAT
from turbolm.ladder.subject import Subject
from turbolm.ops.hardware import probe

_NUM_WORST = 8  # regressions of a rung that are shown
_CONTEXTS = (2048, 8192, 32768)
_MAX_SHOWN = 6000  # characters of a question or an answer


@dataclass(frozen=True, slots=True)
class Run:
    """What was asked for."""

    subject: Subject
    data: str  # file name, or "examples"
    data_hash: str
    num_held_out: int
    config: LadderConfig
    exam: ExamConfig
    engine: EngineConfig
    memory: int  # bytes that the table of what fits refers to
    command: Sequence[str]


def make_report(run: Run, climb: Climb) -> dict[str, Any]:
    """A JSON value; `page` and `table` show it."""
    chosen = climb.recommended
    base = climb.steps[0]
    return {
        "format": FORMAT,
        "model": {"name": run.subject.name, "fingerprint": run.subject.fingerprint},
        "data": {
            "name": run.data,
            "sha256": run.data_hash,
            "num_items": sum(not item.is_probe for item in climb.items),
            "num_probes": sum(item.is_probe for item in climb.items),
            "num_held_out": run.num_held_out,
            "num_unasked": climb.num_unasked,
            "problems": [{"line": problem.line, "message": problem.message} for problem in climb.problems],
        },
        "settings": {**asdict(run.exam), **asdict(run.config)},
        "engine": _changed(run.engine),
        "machine": {**machine(), "gpus": [gpu.name for gpu in probe().gpus], "torch": version("torch")},
        "memory": run.memory,
        "seconds": round(climb.seconds, 1),
        "command": shlex.join(run.command),
        "rungs": [_rung(step, base, climb.items, run.memory) for step in climb.steps],
        "recommended": chosen.rung.name if chosen else None,
        "serve": serving(chosen, run.engine) if chosen else None,
    }


def serving(step: Step, engine: EngineConfig) -> dict[str, Any]:
    """The model and engine options of a rung, and the command that serves it."""
    options = {**_changed(engine), **step.rung.engine_options}
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return {
        "model": step.model,
        "options": options,
        "command": shlex.join(["turbolm", "serve", step.model, *flags]),
    }


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """ConfigError where it can't be written."""
    write_record(path, report)


def _changed(engine: EngineConfig) -> dict[str, Any]:
    """The options that aren't at their defaults."""
    default = EngineConfig()
    names = [field.name for field in fields(engine)]
    return {name: getattr(engine, name) for name in names if getattr(engine, name) != getattr(default, name)}


def _rung(step: Step, base: Step, items: Sequence[Item], memory: int) -> dict[str, Any]:
    outcome, cost = step.outcome, step.cost
    scores = group_scores(items, step.answers)
    probes = {item.group for item in items if item.is_probe}
    found: dict[str, Any] = {
        "name": step.rung.name,
        "title": step.rung.title,
        "status": outcome.status,
        "reason": outcome.reason,
        "model": step.model,
        "fingerprint": step.fingerprint,
        "layers": asdict(step.layers) if step.layers else None,
        "metric": outcome.metric,
        "decision": asdict(outcome.decision) if outcome.decision else None,
        "probes": asdict(outcome.probes) if outcome.probes else None,
        "agreement": asdict(outcome.agreement) if outcome.agreement else None,
        "scores": {name: {**asdict(score), "is_probe": name in probes} for name, score in scores.items()},
        "num_errors": sum(answer.error is not None for answer in step.answers.values()),
        "cost": None,
        "worst": [] if step is base else worst(items, base.answers, step.answers),
    }
    if cost is not None:
        contexts = [context for context in _CONTEXTS if context < cost.max_context] + [cost.max_context]
        found["cost"] = {
            **asdict(cost),
            "memory_bytes": cost.memory(MEMORY_CONTEXT),
            "fits": [{"context": context, "sequences": cost.num_sequences(memory, context)} for context in contexts],
        }
    return found


def worst(items: Sequence[Item], base: Mapping[str, Answer], changed: Mapping[str, Answer]) -> list[dict[str, Any]]:
    """The items that lost most: by score, then by agreement."""
    losses = []
    for item in items:
        if item.key not in base or item.key not in changed:
            continue
        ours, theirs = base[item.key], changed[item.key]
        drop = (ours.score or 0.0) - (theirs.score or 0.0)
        divergence = theirs.agreement.kl if theirs.agreement else 0.0
        if drop > 0 or (theirs.error and not ours.error) or (item.check is None and ours.shown != theirs.shown):
            losses.append((drop, divergence, item.id, item, ours, theirs))
    losses.sort(key=lambda loss: (-loss[0], -loss[1], loss[2]))
    return [_loss(item, ours, theirs) for _, _, _, item, ours, theirs in losses[:_NUM_WORST]]


def _loss(item: Item, base: Answer, changed: Answer) -> dict[str, Any]:
    return {
        "id": item.id,
        "line": item.line,
        "group": item.group,
        "check": item.check.kind if item.check else None,
        "reference": _cut(item.check.shown_reference) if item.check else None,
        "question": _cut(item.question),
        "base": {"text": _cut(base.shown), "score": base.score, "note": base.note},
        "changed": {"text": _cut(changed.shown), "score": changed.score, "note": changed.note},
        "kl": changed.agreement.kl if changed.agreement else None,
    }


def _cut(text: str) -> str:
    """The beginning and the end of what is too long to show."""
    if len(text) <= _MAX_SHOWN:
        return text
    half = _MAX_SHOWN // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters …\n{text[-half:]}"
