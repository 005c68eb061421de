"""The CPU's tables and plots, from records as the benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tables

MACHINE = {"cpu": "A CPU", "cores": 2, "date": "2026-01-02T03:04:05"}


def value(median: float) -> dict:
    return {"median": median, "min": median * 0.9, "max": median * 1.1, "values": [median]}


CONTEXT = {
    "model": "Tiny",
    "machine": MACHINE,
    "tokens_per_second": [
        {"context": 128, "streams": 1, "turbolm": value(120.5), "llama.cpp": value(60.25)},
        {"context": 128, "streams": 8, "turbolm": value(510.0)},
        {"context": 4000, "streams": 1, "turbolm": value(80.0), "llama.cpp": value(30.0)},
    ],
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    return folder


def test_context_table(results: Path) -> None:
    (results / "cpu_context.json").write_text(json.dumps(CONTEXT))
    assert tables.TABLES["cpu-context"]("en").splitlines() == [
        "| context | 1 streams | 8 streams |",
        "|---:|---:|---:|",
        "| 128 | 120.5 (60.25) | 510 |",
        "| 4,000 | 80 (30) |  |",
    ]


def test_start_table(results: Path) -> None:
    engines = {
        "turbolm chat": {"start": value(3.25)},
        "turbolm": {"start": value(3.5), "import": value(2.5), "load": value(0.5), "peak": value(390e6)},
    }
    (results / "cpu_start.json").write_text(json.dumps({"engines": engines}))
    assert tables.TABLES["cpu-start"]("en").splitlines()[2:] == [
        "| turbolm chat | 3.25 |  |  |  |",
        "| turbolm | 3.50 | 2.50 | 0.50 | 390 |",
    ]


def test_llamacpp_table_has_the_rows_that_were_measured(results: Path) -> None:
    speeds = {"prefill 512": {"turbolm": value(1000.0), "llama.cpp": value(200.0), "ratio": value(5.0)}}
    record = {"model": "SmolLM2", "tokens_per_second": speeds}
    (results / "cpu_vs_llamacpp_smollm2_q4_0.json").write_text(json.dumps(record))
    assert tables.TABLES["llamacpp"]("en").splitlines()[2:] == [
        "| SmolLM2 | prefill 512 (beside llama.cpp, Q4_0) | 1,000 | 200 | 5.00x |"
    ]


def test_context_plot_shows_every_engine_and_context(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with the bench extra")
    import plots

    figure = plots.context_plot(CONTEXT)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["turbolm, 128", "llama.cpp, 128", "turbolm, 4,000", "llama.cpp, 4,000"]
    figure.savefig(tmp_path / "x.svg", metadata={"Date": None})
    assert "<svg" in (tmp_path / "x.svg").read_text()
