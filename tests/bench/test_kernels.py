from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbolm.bench import kernels, products
from turbolm.bench.kernels import Ceiling, Measured
from turbolm.bench.limits import Limits
from turbolm.bench.products import Product, Timing
from turbolm.cli.main import main
from turbolm.quant import FORMATS
from turbolm.weights import Weight

LIMITS = Limits({1: 6e9, 2: 10e9}, int8=400e9, float32=100e9)


def measured(name: str, *timings: Timing) -> Measured:
    return Measured(Product("x", [Weight(FORMATS[name], (16, 32), {"data": torch.empty(0)})]), timings)


def test_shares_are_of_the_limit_that_applies():
    found = [measured("q4_1", Timing(1, 0.2, int(1e9), 1e9)), measured("f32", Timing(512, 1.0, 1000, 50e9))]
    ceiling = Ceiling.of(LIMITS, found)
    assert ceiling == Ceiling(10e9, 400e9, 100e9)
    assert ceiling.share(found[0], found[0].timings[0]) == pytest.approx(0.5)  # memory: 0.1 s of 0.2
    assert ceiling.share(found[1], found[1].timings[0]) == pytest.approx(0.5)  # arithmetic: 0.5 s of 1


def test_a_faster_product_than_pytorchs_raises_the_peak():
    ceiling = Ceiling.of(LIMITS, [measured("q4_1", Timing(512, 1.0, 1000, 600e9))])
    assert (ceiling.int8, ceiling.float32) == (600e9, 100e9)


def test_the_command_prints_a_table_and_writes_json(monkeypatch, tmp_path: Path, capsys, smollm2_path: Path):
    monkeypatch.setattr(kernels, "measure_limits", lambda threads: LIMITS)
    monkeypatch.setattr(products, "cold_bytes", lambda: 1 << 20)
    found = tmp_path / "kernels.json"
    options = ["--rows", "1", "4", "--seconds", "0.005", "--threads", "2", "--json", str(found)]
    assert main(["bench", "kernels", str(smollm2_path), *options]) == 0
    printed = capsys.readouterr().out
    assert "reading memory: 6.0 GB/s with 1, 10.0 GB/s with 2" in printed
    row = next(line for line in printed.splitlines() if line.startswith("down_proj"))
    assert row.split()[1:6] == ["30", "q4_1", "576", "x", "1536"]
    assert "GB/s" in row
    assert "GOP/s" in row
    assert "all products of a step with 1 row:" in printed
    record = json.loads(found.read_text())
    assert record["threads"] == 2
    assert record["limits"]["read_bytes_per_second"] == {"1": 6e9, "2": 10e9}
    assert len(record["products"]) == 5
    assert [timing["rows"] for timing in record["products"][0]["timings"]] == [1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows takes numbers from 1 to 65536, got 0"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--threads", "-1"], "--threads must be from 0"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--json", "/"], "is a folder"),
        (["--frob"], "--frob. Did you mean --rows?"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(capsys, options: list[str], message: str):
    assert main(["bench", "kernels", *options]) == 2
    assert message in capsys.readouterr().err
