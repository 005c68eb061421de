"""The profile's arithmetic, and its hooks in a running engine."""

from __future__ import annotations

import pytest
from gpu_profile import Decoding, Kernel, engine_table, gaps_of, kernel_table

from turbolm.config import EngineConfig
from turbolm.loading import load_model


def test_engine_thread_is_timed_while_it_decodes() -> None:
    model = load_model("null", EngineConfig.of(None, device="cpu", max_context=4096), progress=False)
    with Decoding(model, streams=3, context=8, num_tokens=3000, temperature=1.0) as decoding:
        decoding.wait_steps(12)
        found = engine_table(list(decoding.calls), 10)
    assert {"next_batch", "submit", "results", "update", "deliver", "step", "other"} <= set(found)
    parts = sum(entry["per_step"] for name, entry in found.items() if name != "step")
    assert parts == pytest.approx(found["step"]["per_step"])
    assert all(entry["median"] <= entry["max"] for entry in found.values())


def test_engine_table_counts_whole_steps_only() -> None:
    calls = []
    for step in range(5):
        start = step * 0.010
        calls += [
            ("next_batch", start + 0.001, 0.002),
            ("update", start + 0.005, 0.003),
            ("deliver", start + 0.009, 0.001),
        ]
    found = engine_table(calls, 3)
    assert found["step"]["per_step"] == pytest.approx(10)
    assert found["next_batch"]["per_step"] == pytest.approx(2)
    assert found["other"]["per_step"] == pytest.approx(4)


KERNELS = [Kernel("a", 0, 10), Kernel("b", 12, 5), Kernel("a", 15, 4), Kernel("b", 29, 1)]


def test_kernels_are_summed_by_name() -> None:
    assert kernel_table(KERNELS, steps=2) == [
        {"name": "a", "us_per_step": 7.0, "calls": 1.0, "us": 7.0},
        {"name": "b", "us_per_step": 3.0, "calls": 1.0, "us": 3.0},
    ]


def test_gaps_are_negative_where_kernels_overlap() -> None:
    found = gaps_of(KERNELS)  # gaps 0, 2, -2, 10
    assert (found["busy"], found["whole"], found["sum of gaps"], found["largest"]) == (18, 30, 12, 10)
    assert found["median"] == 1.0
