"""`turbolm ladder` and `turbolm serve --ladder` as they are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolm.cli.main import main
from turbolm.server import run as server_run

QUICK = ["--probes", "1", "--probe-words", "50", "--max-tokens", "8", "--max-context", "2048", "--streams", "2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"question {number}", "reference": "a"} for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_whole_run_and_serving_its_recommendation(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    command = ["ladder", "null", "--data", str(data), "--out", str(folder), *QUICK]
    assert main([*command, "--rungs", "kv=int8", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert "KV int8" in printed.out
    assert "not served" in printed.out  # the null model's heads are too small for it
    assert "turbolm serve null" in printed.out
    report = json.loads((folder / "report.json").read_text())
    assert [rung["status"] for rung in report["rungs"]] == ["base", "not served"]
    assert report["rungs"][0]["cost"]["tokens_per_second"] > 0
    assert report["rungs"][0]["cost"]["streams"] == 2
    assert (folder / "report.html").read_text().startswith("<!doctype html>")

    served = []
    monkeypatch.setattr(server_run, "serve", lambda model, config, *rest: served.append((model, *rest)))
    assert main(["serve", "--ladder", str(folder / "report.json"), "--max-batch-size", "3"]) == 0
    model, engine, shadow = served[0]
    assert shadow.rate == 0
    assert (model, engine.threads, engine.max_context, engine.max_batch_size) == ("null", 1, 2048, 3)
    report["recommended"], report["rungs"][0]["agreement"] = "base", {"top1": 0.985}
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["serve", "--ladder", str(folder / "report.json"), "--shadow", "2%"]) == 0
    shadow = served[1][2]
    assert (shadow.rate, shadow.shadow_model, shadow.least) == (0.02, "null", 0.985)
    assert main(["serve", "null", "--ladder", str(folder / "report.json")]) == 2
    assert "names the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/file.jsonl"], "can't read the data file /no/file.jsonl"),
        (["--probes", "0"], "there is nothing to ask"),
        (["--max-drop", "0"], "give more than 0%"),
        (["--rungs", "kv"], "can't read the rung 'kv'"),
        (["--kv", "int8"], "unknown option"),
        (["--judge-url", "http://127.0.0.1:9"], "judge_url and judge_model belong together"),
        (["--out", "/proc/none"], "can't make the folder /proc/none"),
    ],
)
def test_what_cannot_be_used(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", "null", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_lines_end_it_unless_told_to_go_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data.open("a") as file:
        file.write('{"prompt": "broken"\n')
    command = ["ladder", "null", "--data", str(data), "--out", str(tmp_path / "out"), "--rungs", "base", *QUICK]
    assert main(command) == 2
    assert "line 7: not JSON" in capsys.readouterr().err
    assert main([*command, "--keep-going"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["num_items"] == 6
    assert report["data"]["problems"][0]["line"] == 7
