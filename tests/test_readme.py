"""What the READMEs promise: their code runs, both languages show the same code, and their tables are those of the
committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [(ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md")]
PYTHON = re.findall(r"```python\n(.*?)```", PAGES[0], re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_examples_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PYTHON[number], f"README.md, example {number + 1}", "exec"), {})
    assert len(capsys.readouterr().out) > 100


def test_both_languages_show_the_same_code() -> None:
    ours, theirs = (re.findall(r"```python\n(.*?)```", page, re.DOTALL) for page in PAGES)
    assert ours == theirs
    shells = ["".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)) for page in PAGES]
    ours, theirs = ([line.partition("#")[0].strip() for line in shell.splitlines()] for shell in shells)
    assert ours == theirs


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page):
            assert (ROOT / target).exists(), target
