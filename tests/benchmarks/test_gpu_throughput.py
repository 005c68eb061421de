"""The throughput script on a tiny model: rows, ratios, time budget, failures."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import gpu_throughput
import pytest
from gpu_throughput import Row, measure_all, shape_name
from gpu_workloads import Ask, Peer, Workload

SMALL = [
    Workload("W1 batch 2", "decode", (Ask([5], 6), Ask([6, 7], 6)), 2),
    Workload("W2", "run", (Ask([5] * 9, 3), Ask([6], 7)), 1),
    Workload("W5 64 x 4096", "long decode", (Ask([5] * 40, 4), Ask([6] * 40, 4)), 1),
    Workload("W3 first token 8", "first token", (Ask([5] * 8, 1),), 3),
]


def options(model: Path, **changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "model": model, "workloads": ["w1"], "only": None, "greedy": False, "stream": False, "dtype": "auto",
        "deterministic": False,
        "seconds": 60.0, "must": 1.0, "json": None, "device": "cpu", "option": ["max_context=256"],
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def measured(given: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    record: dict[str, Any] = {"machine": {"gpus": [], "cpu": "a CPU"}}
    return asyncio.run(measure_all(given, record)), record


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_throughput, "workloads", lambda group, vocab_size: SMALL)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stream", [False, True])
def test_rows_hold_the_figures_of_their_runs(tiny_model: Path, tmp_path: Path, stream: bool) -> None:
    rows, record = measured(options(tiny_model, json=tmp_path / "w.json", stream=stream))
    assert [row.name for row in rows] == [
        *("W1 batch 2", "W2", "W5 64 x 4096 prefill", "W5 64 x 4096 decode", "W3 first token 8"),
    ]
    assert [row.unit for row in rows] == ["tok/s", "req/s", "s", "ms/step", "ms"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        runs.setdefault(run["name"], []).append(run)
    best = {name: min(run["seconds"] for run in entries) for name, entries in runs.items()}
    figures = {row.name: row.figure for row in rows}
    assert figures["W1 batch 2"] == pytest.approx(12 / best["W1 batch 2"])
    assert rows[0].seconds == pytest.approx((best["W1 batch 2"] - best["W1 batch 2, 1 token"]) / 5)
    assert figures["W2"] == pytest.approx(2 / best["W2"])
    assert figures["W5 64 x 4096 prefill"] == pytest.approx(best["W5 64 x 4096, 1 token"])
    middle = sorted(run["seconds"] for run in runs["W3 first token 8"])[1]
    assert figures["W3 first token 8"] == pytest.approx(middle * 1e3)
    assert [run["answer_tokens"] for run in runs["W2"]] == [10]
    saved = json.loads((tmp_path / "w.json").read_text())
    assert [row["figure"] for row in saved["rows"]] == [row.figure for row in rows]
    assert saved["config"]["prefix_cache"] is False
    assert saved["config"]["speculation"] is False
    assert saved["config"]["reasons"]


@pytest.mark.usefixtures("small")
def test_ratios_point_the_same_way_for_times_and_rates(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_throughput, "best_peer", lambda model, row: Peer("other", 1e-6))
    rows, _ = measured(options(tiny_model))
    verdicts = {row.unit: row.cells[-2] for row in rows}
    assert verdicts == {"tok/s": "yes", "req/s": "yes", "s": "NO", "ms/step": "NO", "ms": "NO"}
    for row in rows:
        assert row.ratio is not None
        assert row.figure is not None
        assert row.ratio == pytest.approx(row.figure / 1e-6 if row.unit.endswith("/s") else 1e-6 / row.figure)


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_is_said(tiny_model: Path) -> None:
    rows, record = measured(options(tiny_model, seconds=0.0))
    assert all(row.figure is None and row.note.startswith("skipped: takes about") for row in rows)
    assert len(rows) == len(SMALL)
    assert record["runs"] == []


def test_a_run_is_cut_off_when_the_time_is_up(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [Workload("long", "run", (Ask([5] * 8, 240),) * 500, 1)]
    monkeypatch.setattr(gpu_throughput, "workloads", lambda group, vocab_size: long)
    start = time.monotonic()
    rows, record = measured(options(tiny_model, seconds=0.3))
    assert rows[0].note.startswith(("cut off", "skipped"))
    assert "long" not in [run["name"] for run in record["runs"]]
    assert time.monotonic() - start < 20  # 120,000 tokens take longer


def test_a_failing_workload_does_not_end_the_others(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [Workload("too long", "run", (Ask([5] * 300, 3),), 1), SMALL[1]]
    monkeypatch.setattr(gpu_throughput, "workloads", lambda group, vocab_size: works)
    rows, _ = measured(options(tiny_model))
    assert rows[0].note.startswith("failed: the prompt has 300 tokens")
    assert rows[1].figure is not None


def test_shapes_are_recognized_by_their_sizes() -> None:
    for name, shape in gpu_throughput.SHAPES.items():
        assert shape_name(shape.config) == name
    assert shape_name({**gpu_throughput.SHAPES["llama-3-8b"].config, "num_hidden_layers": 31}) == ""
