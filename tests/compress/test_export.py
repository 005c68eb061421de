"""What is written beside the weights, and models that come from a GGUF file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from turbolm.compress import quantize, unpack
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.quant import load_weight
from turbolm.text import ChatTemplate, encode_chat, load_tokenizer, tokenizer_from_gguf

TEXTS = ["Hello, world! 12345", "  two  spaces\n\n\ttab", "光合作用 한글 Ωμέγα 🙂", "<|im_start|>user", "don't I'LL"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is 7 prime?"}]


@pytest.fixture(scope="module")
def exported(smollm2_path, tmp_path_factory):
    """SmolLM2 from its GGUF file, rounded."""
    folder = tmp_path_factory.mktemp("export") / "out"
    report = quantize(str(smollm2_path), folder, "rtn", group_size=32)
    return folder, report


def test_tokenizer_of_a_gguf_file_is_the_same(smollm2_path, exported):
    before = tokenizer_from_gguf(open_checkpoint(smollm2_path).gguf.metadata)
    after = load_tokenizer(exported[0])
    for text in TEXTS:
        for options in ({}, {"add_special": False}, {"parse_special": True}):
            assert after.encode(text, **options) == before.encode(text, **options)
    prompts = [encode_chat(tokenizer, ChatTemplate.of(tokenizer), MESSAGES) for tokenizer in (before, after)]
    assert prompts[0] == prompts[1]
    assert (after.eos_ids, after.bos_id, after.vocab_size) == (before.eos_ids, before.bos_id, before.vocab_size)


def test_config_of_a_gguf_file_is_the_same(smollm2_path, exported):
    folder, report = exported
    before, after = open_checkpoint(smollm2_path), open_checkpoint(folder)
    assert decoder_spec(after.config) == decoder_spec(before.config)
    assert after.config["torch_dtype"] == "bfloat16"
    assert after.generation_config["eos_token_id"] == [2]
    assert any("were rounded before (Q4_1)" in warning for warning in report.warnings)
    assert max(matrix.error for matrix in report.matrices) < 0.02


def test_other_files_are_copied(tiny_model, tmp_path):
    folder = tiny_model()
    (folder / "LICENSE").write_text("Apache")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 257}')
    (folder / "weights.bin").write_text("")
    quantize(str(folder), tmp_path / "out", "rtn", format="awq")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "quantization_report.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert open_checkpoint(tmp_path / "out").generation_config["temperature"] == 0.6
    modes = {(tmp_path / "out" / name).stat().st_mode for name in names - {"LICENSE"}}
    assert len(modes) == 1


def test_unpacked_models_are_what_they_were(tiny_model, tmp_path):
    folder = tiny_model()
    unpack(str(folder), tmp_path / "dense")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    quantize(str(folder), tmp_path / "int4", "rtn")
    unpack(str(tmp_path / "int4"), tmp_path / "back")
    assert "quantization_config" not in open_checkpoint(tmp_path / "back").config
    packed, back = open_checkpoint(tmp_path / "int4"), load_file(tmp_path / "back" / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    expected = load_weight(packed.source, module, packed.packing).dequantize(torch.bfloat16)
    assert torch.equal(back[f"{module}.weight"], expected)
