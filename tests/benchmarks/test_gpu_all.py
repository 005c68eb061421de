"""One part's failure is reported and doesn't end the others."""

from __future__ import annotations

import argparse
from pathlib import Path

import gpu_all
import pytest
from gpu_all import Outcome, Part, parts, run, summary
from gpu_record import Clock


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_all, "FOLDER", tmp_path)
    return tmp_path


def outcome(scripts: Path, code: str, seconds: float = 20.0) -> Outcome:
    (scripts / "part.py").write_text(code)
    return run(Part("part", "part.py", ("one",), seconds, 2), scripts, Clock(100))


def test_outcomes(scripts: Path) -> None:
    good = outcome(scripts, "import sys\nprint(1)\nprint(2)\nprint(sys.argv[1:])")
    assert good.state == "ok"
    assert good.lines == ("2", str(["one", "--json", str(scripts / "part.json")]))
    assert outcome(scripts, "raise SystemExit(3)").state == "exit code 3"
    assert outcome(scripts, "import time\ntime.sleep(30)", seconds=0.5).state.startswith("stopped after")
    assert run(Part("x", "x.py", (), 9, 1), scripts, Clock(100)).state == "there is no x.py"
    assert run(Part("part", "part.py", (), 9, 1), scripts, Clock(0)).state == "skipped: no time left"


def test_the_summary_is_short(tmp_path: Path) -> None:
    options = argparse.Namespace(quick=False, gguf=tmp_path / "a.gguf", models=tmp_path, device="auto")
    everything = parts(options)
    full = [Outcome(part.name, "ok", 1.0, ("x" * 500,) * part.num_lines) for part in everything]
    lines = summary(full).split("\n")
    assert len(lines) < 80
    assert max(len(line) for line in lines) <= 150
    assert all(any(line.startswith(part.name) for line in lines) for part in everything)


def test_every_named_script_takes_the_arguments(tmp_path: Path) -> None:
    """`--json` and the rest are real flags of the scripts that belong together."""
    options = argparse.Namespace(quick=True, gguf=None, models=tmp_path, device="cpu")
    for part in parts(options):
        text = (Path(gpu_all.__file__).parent / part.script).read_text() + (
            Path(gpu_all.__file__).parent / "gpu_record.py"
        ).read_text()
        assert all(f'"{flag}"' in text for flag in part.arguments if flag.startswith("--"))
        assert not part.has_json or '"--json"' in text
