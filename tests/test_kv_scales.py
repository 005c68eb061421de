from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbolm.errors import CheckpointError, ConfigError
from turbolm.kv import KvShape
from turbolm.kv_scales import LayerRanges, find_scales, read_scales, scales_path, write_scales

SHAPES = (KvShape(2, 8, 8), KvShape(2, 8, 4))
LAYERS = tuple(LayerRanges(((-1.5, 2.0), (0.0, 0.0)), ((-0.25, 0.5), (1.0, 3.0))) for _ in SHAPES)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = scales_path(tmp_path)
    assert find_scales(tmp_path) == ""
    write_scales(path, LAYERS, 100, "chats.jsonl")
    assert find_scales(tmp_path) == str(tmp_path / "kv_scales.json")
    assert read_scales(path, SHAPES) == LAYERS
    assert scales_path(tmp_path / "a.Q4_1.gguf") == tmp_path / "a.Q4_1.kv_scales.json"
    assert LAYERS[0].part(1, 2) == LayerRanges(((0.0, 0.0),), ((1.0, 3.0),))
    with pytest.raises(ConfigError, match="can't write"):
        write_scales(path / "inside.json", LAYERS, 100, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "it is not of the format turbolm-kv-scales, version 1"),
        ({"layers": []}, "it has 0 layers, the model 2"),
        ({"layers": [{"k": [[0, 1]], "v": [[0, 1]] * 2}] * 2}, "layer 0, k: it must have 2 heads"),
        ({"layers": [{"k": [[0, 1], [1, 0]], "v": [[0, 1]] * 2}] * 2}, r"\[1, 0\] is no minimum and maximum"),
        ({"layers": [{"k": [[0, 1], [0, 1e999]], "v": [[0, 1]] * 2}] * 2}, "is no minimum and maximum"),
        ({"layers": [{"k": [[0, 1], "ab"], "v": [[0, 1]] * 2}] * 2}, "ab is no minimum and maximum"),
        ({"layers": [3, 4]}, "layer 0, k: it must have 2 heads"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = scales_path(tmp_path)
    write_scales(path, LAYERS, 100, "")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_scales(path, SHAPES)
    assert "turbolm quantize kv MODEL" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = scales_path(tmp_path)
    path.write_text(text)
    with pytest.raises(CheckpointError, match="Make it again"):
        read_scales(path, SHAPES)
    with pytest.raises(CheckpointError, match="can't read"):
        read_scales(tmp_path / "none.json", SHAPES)
