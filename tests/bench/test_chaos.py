"""A short soak of the real server, and what a soak calls a fault."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from turbolm.bench.chaos import Soak
from turbolm.cli.main import main

REST = {"vllm:kv_cache_usage_perc": 0.0, "turbolm:engine_restarts_total": 1.0}


def soak(**changes) -> Soak:
    memory = [(float(i), 100.0, 50.0) for i in range(9)]
    found = Soak(Counter(done=7, failed=1, left=2), num_kills=1, num_logged=9, memory=memory, at_rest=dict(REST))
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_a_soak_without_faults():
    assert soak().faults(10) == []
    assert soak(memory=[]).faults(10) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"endings": Counter(done=9, hung=1), "num_logged": 10}, "1 requests hung"),
        ({"endings": Counter(done=9, wrong=1), "num_logged": 10, "wrong": ["2 endings"]}, "2 endings"),
        ({"endings": Counter(done=9)}, "10 requests, 9 endings"),
        ({"num_logged": 7}, "7 log lines"),
        ({"num_logged": 11}, "11 log lines"),
        ({"at_rest": REST | {"vllm:kv_cache_usage_perc": 0.1}}, "KV blocks"),
        ({"at_rest": {}}, "KV blocks"),
        ({"num_kills": 3}, "3 kills, 1.0 restarts"),
        ({"memory": [(float(i), 100.0 + 20 * i, 50.0) for i in range(9)]}, "grew by a factor of 1.33"),
    ],
)
def test_faults(changes, fault):
    assert any(fault in found for found in soak(**changes).faults(10))


def test_a_short_soak(tmp_path, capsys):
    report, plot = tmp_path / "soak.json", tmp_path / "soak.svg"
    options = ["--requests", "40", "--streams", "20", "--tokens", "2000", "--kill-every", "0.3"]
    status = main(["chaos", *options, "--json", str(report), "--plot", str(plot)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    found = json.loads(report.read_text())
    assert sum(found["endings"].values()) == 40
    assert (found["faults"], found["kv_use_at_rest"]) == ([], 0)
    assert found["restarts"] == len(found["kills"]) >= 1
    assert "40 requests" in shown.out
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--requests", "0"], "requests must be 1 or more"),
        (["--cancel", "2"], "cancel is a part"),
        (["--json", "/nothing/file"], "no folder /nothing"),
    ],
)
def test_mistakes_are_said_before_anything_runs(option, message, capsys):
    assert main(["chaos", *option]) == 2
    assert message in capsys.readouterr().err
