from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolm.eval.data import Item, read_item
from turbolm.ladder import subject
from turbolm.ladder.fingerprint import model_fingerprint
from turbolm.ladder.rungs import parse_rung
from turbolm.ladder.subject import Subject, checkpoint_of, open_subject, split

SUBJECT = Subject("org/model", "f" * 64, is_packed=False)


def items(count: int) -> list[Item]:
    return [read_item({"prompt": f"question {number}", "reference": "x"}, number) for number in range(1, count + 1)]


def test_few_items_are_all_asked() -> None:
    asked, held_out = split(items(511))
    assert (len(asked), held_out) == (511, [])


def test_of_many_every_eighth_calibrates_whatever_their_order() -> None:
    many = items(800)
    asked, held_out = split(many)
    assert len(held_out) == 100
    assert {item.key for item in asked}.isdisjoint(item.key for item in held_out)
    assert len(asked) == 700
    assert {item.key for item in split(many[::-1])[1]} == {item.key for item in held_out}
    assert len(split(items(3000))[1]) == 128


def test_calibrated_weights_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOLM_CACHE", str(tmp_path))
    made = []

    def quantize(model, output, method, *, data, group_size, progress):
        made.append((model, method, group_size, data))
        progress(1, 2)
        Path(output).mkdir(parents=True)
        (Path(output) / "config.json").write_text("{}")

    monkeypatch.setattr(subject, "quantize", quantize)
    said: list[str] = []
    rung, both = parse_rung("weights=awq:64"), parse_rung("weights=awq:64+kv=int8")
    folder = checkpoint_of(SUBJECT, rung, items(3), said.append)
    assert checkpoint_of(SUBJECT, both, items(3), said.append) == folder
    assert [entry[:3] for entry in made] == [("org/model", "awq", 64)]
    assert [json.loads(line) for line in Path(made[0][3]).read_text().splitlines()] == [
        {"prompt": f"question {number}"} for number in (1, 2, 3)
    ]
    assert any("1 of 2 layers" in text for text in said)
    assert checkpoint_of(SUBJECT, rung, [], said.append) != folder
    assert made[1][3] == ""  # the shipped text
    assert checkpoint_of(SUBJECT, parse_rung("weights=gptq"), [], said.append) != folder


def test_other_rungs_load_the_model_itself_or_the_one_they_name() -> None:
    assert checkpoint_of(SUBJECT, parse_rung("weights=int8+kv=int8"), [], print) == "org/model"
    assert checkpoint_of(SUBJECT, parse_rung("model=./other"), [], print) == "./other"


def test_a_packed_model_is_known_by_its_headers(smollm2_path: Path) -> None:
    found = open_subject(str(smollm2_path))
    assert found.is_packed
    assert found.fingerprint == model_fingerprint(smollm2_path)


def test_the_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 1000)
    first = model_fingerprint(tmp_path)
    (tmp_path / "notes.md").write_text("not part of it")
    assert model_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"a" * 999 + b"b")
    assert model_fingerprint(tmp_path) != first
