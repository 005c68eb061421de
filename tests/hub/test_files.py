from __future__ import annotations

import json

import pytest

from turbolm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from turbolm.hub.files import Selection, choose, local_model

SAFETENSORS = ["config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_x.py", "pytorch_model.bin"]
GGUFS = ["m-Q4_K_M.gguf", "m-Q4_K.gguf", "m-Q8_0.gguf", "mmproj-m-Q8_0.gguf", "README.md"]


def test_safetensors_without_code_pickles_and_readme():
    chosen = choose(SAFETENSORS, None, "it")
    assert chosen.main == ""
    assert set(chosen.files) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_second_copy_of_the_weights_is_left_out():
    assert "consolidated.safetensors" not in choose([*SAFETENSORS, "consolidated.safetensors"], None, "it").files


def test_safetensors_go_before_gguf_and_subfolders():
    assert choose([*SAFETENSORS, *GGUFS, "sub/config.json", "sub/model.safetensors"], None, "it").main == ""


@pytest.mark.parametrize(
    ("wanted", "main"),
    [("q4_k_m", "m-Q4_K_M.gguf"), ("Q4_K", "m-Q4_K.gguf"), ("Q8_0", "m-Q8_0.gguf"), ("m-Q8_0.gguf", "m-Q8_0.gguf")],
)
def test_quantization_picks_one_file(wanted, main):
    assert choose(GGUFS, wanted, "it") == Selection(main, (main,))


def test_ambiguous_gguf_lists_the_files():
    with pytest.raises(ModelNotFoundError, match=r"m-Q4_K_M\.gguf.*m-Q8_0\.gguf"):
        choose(GGUFS, None, "it")
    with pytest.raises(ModelNotFoundError, match=r"2 files fit"):
        choose(["a/m-Q4_0.gguf", "b/m-Q4_0.gguf"], "Q4_0", "it")
    with pytest.raises(ModelNotFoundError, match=r"doesn't have 'Q5_0'.*m-Q4_K_M\.gguf"):
        choose(GGUFS, "Q5_0", "it")


def test_split_gguf_is_one_model():
    parts = [f"m-Q4_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert choose([*parts, "x-Q8_0.gguf"], "Q4_0", "it") == Selection(parts[0], tuple(parts))
    assert choose(parts, parts[1], "it").main == parts[0]
    with pytest.raises(CheckpointError, match=r"misses m-Q4_0-00002-of-00003\.gguf"):
        choose([parts[0], parts[2]], None, "it")


def test_only_pickles_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"pickle.*pytorch_model\.bin"):
        choose(["config.json", "pytorch_model.bin"], None, "it")


def test_nothing_there():
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        choose(["README.md"], None, "it")


def test_local_folder(tmp_path):
    for name in SAFETENSORS:
        (tmp_path / name).touch()
    assert local_model(tmp_path) == tmp_path


def test_local_folder_with_a_missing_shard(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="misses model-00002-of-00002"):
        local_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="isn't a safetensors index"):
        local_model(tmp_path)


def test_local_file(tmp_path):
    for name in ("a.gguf", "b.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "w.safetensors"):
        (tmp_path / name).touch()
    assert local_model(tmp_path / "b.gguf") == tmp_path / "b.gguf"
    assert local_model(tmp_path / "b-00002-of-00002.gguf").name == "b-00001-of-00002.gguf"
    (tmp_path / "b-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="misses b-00001-of-00002"):
        local_model(tmp_path / "b-00002-of-00002.gguf")
    with pytest.raises(ModelNotFoundError, match="give its folder"):
        local_model(tmp_path / "w.safetensors")
