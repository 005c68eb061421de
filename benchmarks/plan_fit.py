"""Fits `turbolm.planner.speed.GPU` to the GPU records: how much of a data sheet's rates decoding reaches.

python benchmarks/plan_fit.py      # prints the four figures, and each row beside what they predict

Rows: W1, W5's and W6's decode, of all records in bfloat16 whose GPU the planner knows. Least squares of relative
errors. After a run that changed the records, put the figures into speed.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_models
import numpy as np

from turbolm.planner.gpus import parse_machine
from turbolm.planner.speed import GPU, Rates, StepCost, step_seconds

RESULTS = Path(__file__).parent / "results"
_FILE = re.compile(r"gpu_(?P<model>.+?)(?:_(?P<count>\d+)_gpus)?\.json")
_CARDS = {"NVIDIA H200": "h200"}


@dataclass(frozen=True)
class Row:
    """A measured step."""

    name: str
    rates: Rates
    cost: StepCost
    streams: int
    context: int  # mean
    seconds: float

    @property
    def predicted(self) -> float:
        return step_seconds(self.rates, self.cost, self.streams, self.context)


def read_rows(folder: Path = RESULTS) -> list[Row]:
    """Of all records there."""
    return [row for path in sorted(folder.glob("gpu_*.json")) for row in _rows(path)]


def _rows(path: Path) -> Iterator[Row]:
    match = _FILE.fullmatch(path.name)
    record = json.loads(path.read_text())
    whole = path.with_name(f"gpu_{match['model']}.json") if match else path
    card = _CARDS.get(next(iter(record.get("machine", {}).get("gpus", ())), ""))
    if not match or match["model"] not in gpu_models.SHAPES or card is None or not whole.is_file():
        return
    rates = parse_machine(card).rates
    costs, count = json.loads(whole.read_text()).get("costs"), int(match["count"] or 1)
    assert rates is not None
    if costs is None or gpu_models.SHAPES[match["model"]].awq:
        return
    cost = StepCost(
        weight_bytes=costs["weight_bytes"] // count,
        kv_bytes_per_token=int(costs["kv_bytes"]) // count,
        parameters=(costs["layer_parameters"] + costs["head_parameters"]) // count,
        num_layers=gpu_models.SHAPES[match["model"]].num_hidden_layers,
        is_shared=count > 1,
    )
    runs = {run["name"]: run for run in record["runs"]}
    for row in record["rows"]:
        step = _streams_and_context(row, runs)
        if step is not None:
            yield Row(f"{path.stem} {row['name']}", rates, cost, *step, seconds=row["seconds"])


def _streams_and_context(row: dict[str, Any], runs: dict[str, dict[str, Any]]) -> tuple[int, int] | None:
    """Of rows that measure decode steps."""
    run = runs.get(row["name"].removesuffix(" decode"))
    if not row["is_step"] or row["seconds"] is None or run is None:
        return None
    streams = run["requests"]
    return streams, (run["prompt_tokens"] + run["answer_tokens"] // 2) // streams


def features(row: Row) -> list[float]:
    """Seconds by cause, at full rates."""
    cost, rates = row.cost, row.rates
    return [
        cost.weight_bytes / rates.bandwidth,
        row.streams * row.context * cost.kv_bytes_per_token / rates.bandwidth,
        2 * row.streams * cost.parameters / rates.operations,
        cost.num_layers,
        cost.num_layers * cost.is_shared,
    ]


def main() -> None:
    rows = read_rows()
    table = np.array([features(row) for row in rows])
    seconds = np.array([row.seconds for row in rows])
    found, *_ = np.linalg.lstsq(table / seconds[:, None], np.ones(len(rows)))
    print(
        f"weights={1 / found[0]:.3f}, kv={1 / found[1]:.3f}, arithmetic={found[2]:.3f}, "
        f"layer_seconds={found[3]:.3g}, exchange_seconds={found[4]:.3g}; now {GPU}"
    )
    for row, fitted in zip(rows, table @ found, strict=True):
        now = row.predicted / row.seconds - 1
        print(f"{row.name:<42}{row.seconds * 1e3:8.3f} ms  fitted {fitted / row.seconds - 1:+.1%}  now {now:+.1%}")


if __name__ == "__main__":
    main()
