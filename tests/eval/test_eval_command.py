"""`turbolm eval` as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolm.cli.main import main


def test_scores_of_each_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "mine.jsonl", tmp_path / "scores.json"
    rows = [
        {"id": "letters", "group": "form", "prompt": "abc", "check": {"kind": "regex", "pattern": "^[a-z]+$"}},
        {"id": "digits", "group": "form", "prompt": "abd", "check": {"kind": "regex", "pattern": "^[0-9]+$"}},
        {"id": "story", "group": "texts", "text": "Once upon a time."},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "null", "--data", str(data), "--max-tokens", "5", "--json", str(output)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("form")).split()[:3] == ["form", "2", "50.0%"]
    record = json.loads(output.read_text())
    assert record["scores"]["form"]["mean"] == 0.5
    assert record["scores"]["form"]["low"] < 0.5 < record["scores"]["form"]["high"]
    assert record["scores"]["texts"]["perplexity"] > 1
    assert [(row["id"], row["score"]) for row in record["answers"]] == [("letters", 1), ("digits", 0), ("story", None)]
    assert record["machine"]["turbolm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to ask"),
        (["--data", "examples", "--judge-url", "x"], "judge_url and judge_model belong together"),
        (["--data", "examples", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--data", "/no/file"], "can't read the data file"),
    ],
)
def test_what_cannot_be_used(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "null", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_items_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "fine"}\n{"promt": "x"}\n' + json.dumps({"prompt": "x" * 300}) + "\n")
    command = ["eval", "null", "--data", str(data), "--max-context", "256", "--max-tokens", "4"]
    assert main(command) == 2
    assert "line 2: unknown field 'promt'" in capsys.readouterr().err
    assert main([*command, "--keep-going"]) == 0
    printed = capsys.readouterr().out
    assert "2 items were left out: line 2: unknown field" in printed
