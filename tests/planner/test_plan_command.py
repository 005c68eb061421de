"""`turbolm plan` from the command line."""

from __future__ import annotations

import json

import pytest

from turbolm.cli.main import main


def test_the_answer_comes_after_the_table(shape, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", shape("internlm2-20b"), "--gpu", "24GB", "--gpu", "h200x2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "internlm2-20b: 19.9 billion parameters, contexts up to 32768"
    answers = [line for line in lines if line.startswith("internlm2-20b in ")]
    assert "fits one 24 GB card" in answers[0]
    assert "tokens/s" not in answers[0]  # nothing is known of such a card but its size
    assert "fits 2 x NVIDIA H200, of which it takes 1" in answers[1]
    assert "tokens/s for one answer" in answers[1]
    assert sum(line.startswith("turbolm serve ") for line in lines) == 2


def test_as_json(shape, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "4090", "--context", "2048", "--concurrency", "4", "--json"]
    assert main(["plan", shape("llama-3-8b"), *arguments]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["parameters"] == pytest.approx(8.03e9, rel=0.001)
    (machine,) = value["machines"]
    assert (machine["context"], machine["concurrency"], machine["fits"]) == (2048, 4, True)


def test_bad_arguments_are_refused_in_a_line(shape, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--gpu", "h2000"], "Did you mean 'h200'?"),
        (["--gpu", "h200", "--context", "100000"], "was made for 8192"),
        (["--gpu", "h200", "--concurrency", "-1"], "from 1 on"),
    ):
        assert main(["plan", shape("llama-3-8b"), *arguments]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
    assert main(["plan", "/no/such/folder", "--gpu", "h200"]) == 2
