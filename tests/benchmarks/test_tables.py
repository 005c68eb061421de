"""The READMEs' tables from records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tables


def row(name: str, unit: str, figure: float | None, **changes: object) -> dict[str, object]:
    values = {"name": name, "unit": unit, "figure": figure, "seconds": 2.0, "floor_seconds": 1.5}
    values |= {"peer": None, "peer_figure": None, "ratio": None}
    return {**values, **changes}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    record = {
        "model": "llama-3-8b", "config": {"dtype": "bfloat16"},
        "machine": {"gpus": ["A GPU"], "cpu": "a CPU", "date": "2026-01-02T03:04:05+00:00"},
        "rows": [
            row("W1 batch 1", "tok/s", 250.25, peer="vLLM", peer_figure=206.5, ratio=1.2119),
            row("W2", "req/s", 70.0),
            row("W3", "-", None, seconds=None),
        ],
    }  # fmt: skip
    (folder / "gpu_llama-3-8b.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "ROOT", tmp_path)


@pytest.mark.usefixtures("results")
def test_gpu_table_shows_what_was_measured() -> None:
    page = "before\n<!-- table gpu-llama-3-8b -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(page, "en")
    assert "| W1 batch 1 | tok/s | 250.2 | 206.5 (vLLM) | 1.21x | 75% |" in filled
    assert "| W2 | req/s | 70 |  |  | 75% |" in filled
    assert "W3" not in filled
    assert "old" not in filled
    assert "A GPU, 2026-01-02" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert tables.filled(filled, "en") == filled
    assert "硬件极限" in tables.filled(page, "zh")


def test_peers_table_has_every_row_and_engine() -> None:
    table = tables.gpu_peers("llama-3-8b")
    assert "| W1 batch 1 | tok/s | 206.5 | 202.5 | 170.8 |" in table
    assert "| W2, KV cache int4 | req/s |  | 63.67 |  |" in table
    lines = table.split("\n")
    assert {line.count("|") for line in lines} == {6}
