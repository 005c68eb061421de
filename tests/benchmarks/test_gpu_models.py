"""The random models: loadable, of the size they claim, and drawn as they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gpu_models
import pytest
import torch
from safetensors import safe_open

from turbolm import LLM, SamplingParams


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iteration)
    return found


def small(name: str) -> gpu_models.Shape:
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32, "intermediate_size": 256, "vocab_size": 600, "max_position_embeddings": 256}
    return replace(gpu_models.SHAPES[name], **sizes)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-0.6b", "internlm2-20b"])
def test_every_family_loads_and_answers(name: str, tmp_path: Path) -> None:
    gpu_models.write_model(small(name), tmp_path, device="cpu", threads=2)
    with LLM(str(tmp_path), device="cpu", progress=False) as llm:
        assert llm.tokenizer.vocab_size == 600
        answer = llm.generate([5, 6, 7], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].outputs[0]
    assert answer.error is None
    assert len(answer.token_ids) == 4


def test_values_are_drawn_as_described(tmp_path: Path) -> None:
    gpu_models.write_model(small("llama-3-8b"), tmp_path, device="cpu", threads=2)
    found = tensors(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    for tensor_name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if "norm" in tensor_name:
            assert (tensor == 1).all()
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.05)
    layers = [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    assert not torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[0], layers[2])  # in another file


def test_awq_files_have_autoawq_s_layout(tmp_path: Path) -> None:
    shape = replace(small("llama-2-7b-awq"), num_key_value_heads=4)
    gpu_models.write_model(shape, tmp_path, device="cpu", threads=2)
    found = tensors(tmp_path)
    down = {kind: found[f"model.layers.0.mlp.down_proj.{kind}"] for kind in ("qweight", "qzeros", "scales")}
    assert {kind: (tuple(t.shape), t.dtype) for kind, t in down.items()} == {
        "qweight": ((256, 16), torch.int32), "qzeros": ((2, 16), torch.int32), "scales": ((2, 128), torch.float16),
    }  # fmt: skip
    assert "model.layers.0.mlp.down_proj.weight" not in found
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4


def test_every_id_of_the_vocabulary_is_text() -> None:
    tokenizer = gpu_models.byte_vocabulary(1000)
    assert tokenizer.get_vocab_size() == 1000
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界").ids) == "Grüße, 世界"
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(1000))
    with pytest.raises(SystemExit, match="256 tokens; a byte-level tokenizer needs 257"):
        gpu_models.byte_vocabulary(256)


def test_sizes_are_those_of_the_models() -> None:
    sizes = {
        name: sum(plan.num_bytes for file in gpu_models.shards(shape) for plan in file)
        for name, shape in gpu_models.SHAPES.items()
    }
    # Parameters times bytes, as published: 8.03, 70.55, 0.596 and 19.86 thousand million in bf16.
    assert sizes["llama-3-8b"] / 2e9 == pytest.approx(8.030, abs=0.001)
    assert sizes["llama-3-70b"] / 2e9 == pytest.approx(70.554, abs=0.001)
    assert sizes["qwen3-0.6b"] / 2e9 == pytest.approx(0.596, abs=0.001)
    assert sizes["internlm2-20b"] / 2e9 == pytest.approx(19.861, abs=0.001)
    assert sizes["llama-2-7b-awq"] / 1e9 == pytest.approx(3.89, abs=0.01)
