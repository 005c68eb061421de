from __future__ import annotations

import time
from pathlib import Path

import torch

from turbolm.bench import limits
from turbolm.bench.limits import Limits, best_seconds, cold_bytes, measure_limits


def test_limits_of_every_number_of_threads(monkeypatch):
    monkeypatch.setattr(limits, "_SECONDS", 0.01)
    monkeypatch.setattr(limits, "_MIN_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_GEMM_SIZE", 128)
    monkeypatch.setattr(limits, "cold_bytes", lambda: 1 << 22)
    before = torch.get_num_threads()
    found = measure_limits(3)
    assert torch.get_num_threads() == before
    assert list(found.read) == [1, 2, 3]
    rates = [*found.read.values(), found.int8, found.float32]
    assert all(1e7 < rate < 1e15 for rate in rates), rates


def test_best_of_two_measurements():
    found = Limits({1: 5.0, 2: 9.0}, 100.0, 10.0).best(Limits({1: 6.0, 2: 8.0}, 90.0, 20.0))
    assert found == Limits({1: 6.0, 2: 9.0}, 100.0, 20.0)


def test_cold_memory_exceeds_the_largest_cache(tmp_path: Path):
    for index, size in enumerate(("48K", "2048K", "320M")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert cold_bytes(tmp_path) >= 2 * (320 << 20)
    assert cold_bytes(tmp_path / "nothing") > 64 << 20


def test_best_seconds_is_the_shortest_call():
    pauses = iter([0.03, 0.001, 0.03, 0.03, 0.03])
    assert 0.001 <= best_seconds(lambda: time.sleep(next(pauses)), limit=0.05) < 0.02
