from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbolm.errors import CheckpointError
from turbolm.models.pooling import choose_pooling

KIND = "sentence_transformers.models."


def folder_of(path: Path, config: dict[str, Any] | None, *more: str) -> Any:
    """A checkpoint with these modules."""
    modules = [{"path": "", "type": KIND + "Transformer"}]
    if config is not None:
        modules.append({"path": "1_Pooling", "type": KIND + "Pooling"})
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    modules += [{"path": f"2_{name}", "type": KIND + name} for name in more]
    (path / "modules.json").write_text(json.dumps(modules))
    return SimpleNamespace(path=path, gguf=None)


def old_flags(*on: str) -> dict[str, Any]:
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 64} | {f"pooling_mode_{name}": name in on for name in names}


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (old_flags("lasttoken"), "last"),
        (old_flags("mean_tokens"), "mean"),
        ({"embedding_dimension": 64, "pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_sentence_transformers_say_how(tmp_path: Path, config: dict[str, Any], pooling: str) -> None:
    choice = choose_pooling(folder_of(tmp_path, config, "Normalize"))
    assert choice.pooling == pooling and choice.refusal is None and "1_Pooling/config.json" in choice.reason


@pytest.mark.parametrize("config", [old_flags("cls_token"), old_flags("lasttoken", "mean_tokens"), old_flags()])
def test_what_turbolm_lacks_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    assert "1_Pooling/config.json" in (choose_pooling(folder_of(tmp_path, config)).refusal or "")


def test_further_modules_are_refused(tmp_path: Path) -> None:
    assert "'Dense'" in (choose_pooling(folder_of(tmp_path, old_flags("mean_tokens"), "Dense")).refusal or "")


def test_plain_models_have_the_last_token(tmp_path: Path) -> None:
    assert choose_pooling(SimpleNamespace(path=tmp_path, gguf=None)).pooling == "last"  # type: ignore[arg-type]
    assert choose_pooling(folder_of(tmp_path, None)).pooling == "last"


@pytest.mark.parametrize("text", ["{", "5", '["a"]'])
def test_broken_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        choose_pooling(SimpleNamespace(path=tmp_path, gguf=None))  # type: ignore[arg-type]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, old_flags("mean_tokens"))
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="download the model again"):
        choose_pooling(checkpoint)


@pytest.mark.parametrize(
    ("number", "pooling", "is_refused"),
    [
        (None, "last", False),
        (0, "last", False),
        (1, "mean", False),
        (2, "last", True),
        (3, "last", False),
        (9, "last", True),
    ],
)
def test_gguf_metadata(tmp_path: Path, number: int | None, pooling: str, is_refused: bool) -> None:
    metadata = {"general.architecture": "qwen3"} | ({} if number is None else {"qwen3.pooling_type": number})
    choice = choose_pooling(SimpleNamespace(path=tmp_path, gguf=SimpleNamespace(metadata=metadata)))  # type: ignore[arg-type]
    assert choice.pooling == pooling and (choice.refusal is not None) == is_refused
