"""Opening a model: folders, GGUF files, and what is wrong with the ones that can't be opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from turbolm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.quant import load_weight

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


def write_folder(folder: Path, config: Any = CONFIG) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x.weight": torch.ones(3, 4, dtype=torch.bfloat16)}, folder / "model.safetensors")


def test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.path, checkpoint.config, checkpoint.gguf) == (tmp_path, CONFIG, None)
    assert checkpoint.generation_config == {"temperature": 0.5}
    assert checkpoint.total_weight_bytes == 24
    assert torch.equal(load_weight(checkpoint.source, "x").dequantize(torch.float32), torch.ones(3, 4))


def test_gguf_file_and_folder_with_one(write_gguf: Any) -> None:
    path = write_gguf()
    for given in (path, path.parent):
        checkpoint = open_checkpoint(given)
        assert checkpoint.path == path
        assert checkpoint.config["hidden_size"] == 64
        assert checkpoint.gguf is not None
        assert checkpoint.gguf.metadata["general.architecture"] == "llama"
        assert checkpoint.total_weight_bytes == sum(t.num_bytes for t in checkpoint.gguf.tensors.values())


def test_folder_with_a_split_set(write_gguf: Any, tmp_path: Path) -> None:
    write_gguf(split_max_tensors=4)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path.name == "model-00001-of-00003.gguf"
    assert "model.norm.weight" in checkpoint.source.tensors
    assert "model.embed_tokens.weight" in checkpoint.source.tensors


def test_folder_with_two_gguf_models(write_gguf: Any, tmp_path: Path) -> None:
    write_gguf(name="a.gguf")
    write_gguf(name="b.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF models.*a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_default_model(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.config["vocab_size"] == 49152
    assert load_weight(checkpoint.source, "model.layers.29.self_attn.q_proj").format.name == "q4_1"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        open_checkpoint(tmp_path / "absent")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is no model"):
        open_checkpoint(tmp_path / "config.json")


def test_missing_config(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file_name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_broken_json(tmp_path: Path, file_name: str, text: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / file_name).write_bytes(text)
    with pytest.raises(CheckpointError, match=file_name):
        open_checkpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("quantization", [{"quant_method": "made_up"}, {"bits": 4}, "int4"])
def test_quantization_that_no_format_reads(tmp_path: Path, quantization: Any) -> None:
    write_folder(tmp_path, CONFIG | {"quantization_config": quantization})
    with pytest.raises(UnsupportedModelError, match=r"quantized by.*GGUF"):
        open_checkpoint(tmp_path)
