from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolm.bench.record import check_writable, machine, write_record
from turbolm.errors import ConfigError


def test_a_record_replaces_the_last_one(tmp_path: Path):
    path = tmp_path / "x.json"
    for value in (1, 2):
        write_record(path, {"value": value})
    assert json.loads(path.read_text()) == {"value": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_that_cannot_be_written_is_one_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="can't write"):
        write_record(tmp_path / "missing" / "x.json", {})
    with pytest.raises(ConfigError, match="there is no folder"):
        check_writable(tmp_path / "missing" / "x.json")
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "x.json")
    check_writable(None)


def test_machine_tells_where_figures_come_from():
    found = machine()
    assert found["cores"] >= 1
    assert found["date"].startswith("20")
    json.dumps(found)
