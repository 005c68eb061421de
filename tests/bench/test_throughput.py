from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolm.cli.main import main


def test_every_workload_is_timed_in_every_round(tmp_path: Path, capsys):
    found = tmp_path / "throughput.json"
    options = ["--streams", "1", "3", "--prompt", "40", "--context", "8", "--answer", "300", "--rounds", "2"]
    assert main(["bench", "throughput", "null", *options, "--threads", "1", "--json", str(found)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(found.read_text())
    rows = record["tokens_per_second"]
    assert list(rows) == ["prefill 40", "decode, 1 streams after 8", "decode, 3 streams after 8"]
    for name, row in rows.items():
        assert name in printed
        assert len(row["values"]) == 2
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert record["config"]["speculation"] is False
    assert record["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--streams", "0"], 2, "--streams must be from 1 to 4096, got 0"),
        (["--answer", "1"], 2, "--answer must be from 2"),
        (["--rounds", "0"], 2, "--rounds must be from 1"),
        (["--json", "/no/such/folder/x.json"], 2, "there is no folder"),
        (["--prompt", "70000"], 2, "the longest context is 65536"),
        (["--streams", "4096", "--context", "900"], 1, "the KV cache has room for"),
        (["--device", "gpu"], 2, 'Did you mean "cpu"'),
    ],
)
def test_what_cannot_be_timed_is_refused(capsys, options: list[str], status: int, message: str):
    assert main(["bench", "throughput", "null", *options]) == status
    assert message in capsys.readouterr().err
