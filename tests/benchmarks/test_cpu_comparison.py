"""cpu_vs_llamacpp.py, cpu_context.py and cpu_start.py: what they run, in which order, and what they keep."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cpu_context
import cpu_start
import cpu_vs_llamacpp
import measure
import pytest
from children import Child, Setup, nested_prompts
from cpu_vs_llamacpp import Comparison, Row, estimate
from measure import PREFILL, decode

WORKS = [PREFILL, decode(1)]


class FakeChild:
    """turbolm is twice as fast as llama.cpp; each figure names the round."""

    calls: list[str]

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup, self.about = name, setup, {"version": "1", "kv_tokens": 1000}

    def run(self, work: measure.Workload, round_: int) -> float:
        self.calls.append(self.name)
        return (200.0 if self.name == "turbolm" else 100.0) + round_

    def run_after(self, streams: int, context: int, answer: int) -> float:
        self.calls.append(f"{self.name} {context} x {streams}")
        return 10.0 * streams

    def close(self) -> None:
        self.calls.append(f"close {self.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    FakeChild.calls = []
    for module in (cpu_vs_llamacpp, cpu_context):
        monkeypatch.setattr(module, "Child", FakeChild)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return FakeChild.calls


@pytest.fixture
def row(tmp_path: Path) -> Row:
    files = {}
    for name, size in (("turbolm", 3000), ("llama.cpp", 2000)):
        files[name] = tmp_path / f"{name}.gguf"
        files[name].write_bytes(b"x" * size)
    return Row("requantized", "cpu_vs_llamacpp_x", files)


def test_rounds_alternate_and_the_first_is_not_kept(calls: list[str], row: Row) -> None:
    comparison = Comparison(row, WORKS, 2, "off")
    for round_ in range(3):
        comparison.run_round(round_)
    a, b = "turbolm", "llama.cpp"
    assert calls == [b, a, b, a, a, b, a, b, b, a, b, a]
    table = comparison.table()
    assert table["prefill 512"]["turbolm"]["values"] == [201.0, 202.0]
    assert table["prefill 512"]["ratio"]["values"] == [201 / 101, 202 / 102]


def test_every_round_is_saved(calls: list[str], row: Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that is cut off in its third round keeps two."""
    comparison = Comparison(row, WORKS, 2, "off")
    run_round = comparison.run_round

    def cut_off(round_: int) -> None:
        if round_ == 3:
            raise KeyboardInterrupt
        run_round(round_)

    monkeypatch.setattr(comparison, "run_round", cut_off)
    with pytest.raises(KeyboardInterrupt):
        cpu_vs_llamacpp.run_row(comparison, 5, keep=True)
    record = json.loads((tmp_path / "cpu_vs_llamacpp_x.json").read_text())
    assert len(record["tokens_per_second"]["prefill 512"]["turbolm"]["values"]) == 2
    assert record["files"] == {"turbolm": "turbolm", "llama.cpp": "llama.cpp"}
    assert record["row"] == "requantized"


def test_the_estimate_grows_with_the_work(row: Row) -> None:
    one = estimate(row, WORKS, 1)
    assert 0 < one < estimate(row, WORKS, 5) < estimate(row, [*WORKS, decode(16)], 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--rounds", "0"], "--rounds takes 1 or more"), (["--rows", "given"], "takes --model")],
)
def test_bad_options(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_vs_llamacpp.py", *options])
    with pytest.raises(SystemExit):
        cpu_vs_llamacpp.main()
    assert message in capsys.readouterr().err


def test_cases_are_those_that_fit() -> None:
    options = argparse.Namespace(contexts=[4000, 128], streams=[1, 8], answer=48)
    assert cpu_context.cases(options, {"turbolm": 5000, "llama.cpp": 200}) == [
        (128, 1, ("turbolm", "llama.cpp")),
        (128, 8, ("turbolm",)),
        (4000, 1, ("turbolm",)),
    ]


def test_contexts_are_saved_case_by_case(
    calls: list[str], tmp_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--contexts", "100", "--streams", "1", "2", "--answer", "8", "--rounds", "1", "--llama-tokens", "120"]
    monkeypatch.setattr(sys, "argv", ["cpu_context.py", "--model", str(smollm2_path), *options, "--save", "found"])
    cpu_context.main()
    rows = json.loads((tmp_path / "found.json").read_text())["tokens_per_second"]
    assert [(row["context"], row["streams"], "llama.cpp" in row) for row in rows] == [(100, 1, True), (100, 2, False)]
    assert calls[:4] == ["turbolm 100 x 1", "llama.cpp 100 x 1", "llama.cpp 100 x 1", "turbolm 100 x 1"]


def test_prompts_are_nested() -> None:
    small, large = nested_prompts(2, 50, 49152), nested_prompts(4, 80, 49152)
    assert [prompt[:50] for prompt in large[:2]] == small
    assert len({tuple(prompt) for prompt in large}) == 4


def test_a_child_runs_an_engine() -> None:
    child = Child("turbolm", Setup("null", 1, 256, 4))
    assert child.about["kv_tokens"] >= 256
    assert child.run(decode(2, 16, 200), 1) > 0
    assert child.run_after(2, 32, 200) > 0
    child.close()
    assert child.process.returncode == 0


def test_an_engine_that_fails_ends_the_run() -> None:
    with pytest.raises(SystemExit, match=r"turbolm: its process ended with status"):
        Child("turbolm", Setup("no-such-model.gguf", 1, 256, 4))


def test_the_start_is_timed_in_a_process_of_its_own() -> None:
    found = cpu_start.run_child("turbolm", "null")
    assert 0 < found["import"] < found["start"]
    assert found["import"] + found["load"] + found["prompt"] <= found["start"]
    assert 50e6 < found["peak"] < 5e9
    assert 0 < cpu_start.run_child("turbolm chat", "null")["start"] < 120
