"""The long-context benchmark at small scale, on the CPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from gpu_long_context import NEEDLE, QUESTION, haystack, prepared, run

from turbolm import LLM


def options(model: Path, **changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "model": str(model), "lengths": [300], "chunk": 64, "rope": None, "needles": False, "depths": [0.0, 1.0],
        "json": None, "device": "cpu", "option": ["kv_memory=64M"],
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def test_lengths_are_measured_and_recorded(tiny_model: Path, tmp_path: Path) -> None:
    record: dict[str, Any] = {}
    rows = run(options(tiny_model, needles=True, json=tmp_path / "long.json"), record)
    (found,) = record["lengths"]
    assert found["prompt_tokens"] == 300 - 32 and found["first_seconds"] > 0 and found["token_seconds"] > 0
    assert len(found["needles"]) == 2
    assert rows[0][0] == "300"
    assert json.loads((tmp_path / "long.json").read_text())["lengths"] == [found]


@pytest.mark.parametrize("rope", [None, "yarn", "dynamic", "linear"])
def test_a_longer_context_is_had_by_a_changed_copy(tiny_model: Path, tmp_path: Path, rope: str | None) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    for path in tiny_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    with prepared(str(tmp_path), 128, rope) as same:
        assert same == str(tmp_path)
    record: dict[str, Any] = {}
    run(options(tmp_path, lengths=[192], rope=rope), record)
    assert record["lengths"][0]["prompt_tokens"] == 160


def test_the_needle_stands_at_its_depth(tiny_model: Path) -> None:
    with LLM(str(tiny_model), device="cpu", max_context=512, kv_memory="64M", progress=False) as llm:
        for depth in (0.0, 0.5, 1.0):
            tokens = haystack(llm, 400, depth, "12345")
            assert len(tokens) == 400
            text = llm.tokenizer.decode(tokens)
            needle = NEEDLE.format(code="12345").strip()
            assert text.endswith(QUESTION)
            place = text.index(needle) / (len(text) - len(needle) - len(QUESTION))
            assert place == pytest.approx(depth, abs=0.05)
