"""A plan in words: the answer, the command that serves it, what to change where nothing fits; and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from turbolm.config import format_size
from turbolm.planner.gpus import more_cards
from turbolm.planner.model import PlannedModel
from turbolm.planner.plan import Fit, Plan, Rung, plan

_MIB = 1 << 20


def title(rung: Rung, model: PlannedModel) -> str:
    """`in int4 with int8 KV`."""
    if rung.weights != "auto":
        weights = f"in {rung.weights}"
    else:
        weights = "as it is" if model.is_packed else "in 16 bits"
    return weights + (f" with {rung.kv} KV" if rung.kv != "auto" else "")


def answer(model: PlannedModel, found: Plan) -> str:
    """One or two sentences: what fits, or what is missing and what would help."""
    best = found.best
    if best is None:
        return f"{_refusal(model, found)} {_advice(model, found)}".rstrip()
    where = found.machine.title
    if best.tensor_parallel < found.machine.num_gpus:
        where += f", of which it takes {best.tensor_parallel}"
    words = f"{model.name} {title(best.rung, model)} fits {where}: {_streams(found, best)}"
    more = next((fit for fit in found.fits if _is_next(fit, best) and fit.concurrency > best.concurrency), None)
    if more is not None:
        words += f"; with {more.rung.kv} KV x {more.concurrency}"
    if best.tokens_per_second and best.tokens_per_second_full:
        alone, full = rounded(best.tokens_per_second), rounded(best.tokens_per_second_full)
        words += f". About {alone:,} tokens/s for one answer"
        words += f", {full:,} for {best.concurrency} together" if best.concurrency > 1 else ""
    return words + "."


def _streams(found: Plan, fit: Fit) -> str:
    return f"{found.demand.context}-token contexts x {fit.concurrency}"


def _is_next(fit: Fit, best: Fit) -> bool:
    """The same with a smaller KV cache."""
    same = (fit.rung.weights, fit.tensor_parallel) == (best.rung.weights, best.tensor_parallel)
    return same and best.rung.kv == "auto" and fit.rung.kv == "int8"


def _refusal(model: PlannedModel, found: Plan) -> str:
    fit = _smallest(found)
    context, count = found.demand.context, max(1, found.demand.concurrency)
    blocks = -(-context // fit.block_size) * fit.block_size
    return (
        f"{model.name} does not fit {found.machine.title} with {context}-token contexts x {count}: even "
        f"{title(fit.rung, model)} it needs {format_size(fit.weight_bytes)} for weights, "
        f"{format_size(count * blocks * fit.kv_bytes_per_token)} for the KV cache and "
        f"{format_size(fit.working.total)} to work in"
        + (" on each GPU" if fit.tensor_parallel > 1 else "")
        + f", and {format_size(fit.free_bytes)} are free."
    )


def _smallest(found: Plan) -> Fit:
    """What comes nearest to fitting."""
    return max(found.fits, key=lambda fit: (fit.kv_tokens, fit.free_bytes - fit.needed_bytes))


def _advice(model: PlannedModel, found: Plan) -> str:
    fit = _smallest(found)
    count = max(1, found.demand.concurrency)
    ways = []
    context = fit.kv_tokens // count // fit.block_size * fit.block_size
    if context >= fit.block_size:
        ways.append(f"--context {context}")
    if found.demand.concurrency and fit.concurrency:
        ways.append(f"--concurrency {fit.concurrency}")
    if found.machine.num_gpus and found.machine.name != "here":
        ways += _more_gpus(model, found)
    return f"What would fit: {', '.join(ways)}." if ways else "Take a smaller model, or a larger machine."


def _more_gpus(model: PlannedModel, found: Plan) -> list[str]:
    for count in (2, 4, 8):
        if count > found.machine.num_gpus:
            larger = plan(model, more_cards(found.machine, count), found.demand)
            if larger.best is not None:
                return [f"--gpu {larger.machine.name} ({title(larger.best.rung, model)})"]
    return []


def command(model: PlannedModel, found: Plan) -> str | None:
    """What serves the answer; None where nothing fits."""
    best = found.best
    if best is None:
        return None
    options = {
        "--weights": best.rung.weights if best.rung.weights != "auto" else "",
        "--kv": best.rung.kv if best.rung.kv != "auto" else "",
        "--max-context": str(found.demand.context),
        "--max-batch-size": str(best.concurrency),
        "--tensor-parallel": str(best.tensor_parallel) if best.tensor_parallel > 1 else "",
        "--kv-memory": "" if found.machine.num_gpus else _pool(found, best),
    }
    words = ["turbolm", "serve", "MODEL" if model.is_shape else model.given]
    words += [word for name, value in options.items() if value for word in (name, value)]
    return shlex.join(words)


def _pool(found: Plan, fit: Fit) -> str:
    """The KV cache's size as a flag: on a CPU, "auto" takes only a part of the memory."""
    blocks = -(-found.demand.context // fit.block_size) * fit.block_size
    return f"{-(-blocks * fit.concurrency * fit.kv_bytes_per_token // _MIB)}M"


def as_json(model: PlannedModel, plans: list[Plan]) -> dict[str, Any]:
    """All of it; bytes are those of each GPU."""
    return {
        "model": model.name,
        "family": model.spec.family,
        "parameters": model.num_parameters,
        "max_context": model.spec.max_context,
        "machines": [_machine(model, found) for found in plans],
    }


def _machine(model: PlannedModel, found: Plan) -> dict[str, Any]:
    best = found.best
    return {
        "name": found.machine.name,
        "title": found.machine.title,
        **asdict(found.demand),
        "fits": best is not None,
        "answer": answer(model, found),
        "command": command(model, found),
        "best": found.fits.index(best) if best is not None else None,
        "rows": [
            {**asdict(fit), "weights": fit.rung.weights, "kv": fit.rung.kv, "working_bytes": fit.working.total}
            for fit in found.fits
        ],
    }


def rounded(rate: float) -> int:
    """Two digits: a prediction has no more."""
    scale: int = 10 ** max(0, len(str(int(rate))) - 2)
    return round(rate / scale) * scale
