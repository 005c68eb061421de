"""GGUF tensors under Hugging Face names, with q and k in Hugging Face order."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.models.gguf import GGUFFile
from turbolm.models.gguf_source import GGUFSource
from turbolm.quant import load_weight

RNG = np.random.default_rng(3)
HEADS, KV_HEADS, HIDDEN = 4, 2, 64


def converted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter writes them: element i of a head's first half, then
    element i of its second half."""
    result = []
    for head in np.split(rows, heads):
        first, second = np.split(head, 2)
        for pair in zip(first, second, strict=True):
            result.extend(pair)
    return np.stack(result)


def test_names_are_those_of_hugging_face(write_gguf: Any) -> None:
    source = GGUFSource(GGUFFile(write_gguf()))
    layer = "model.layers.0"
    assert set(source.tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        f"{layer}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight",
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    info = source.tensors[f"{layer}.mlp.down_proj.weight"]
    assert (info.shape, info.dtype, info.num_bytes) == ((64, 96), "F32", 64 * 96 * 4)


@pytest.mark.parametrize("architecture", ["llama", "internlm2"])
def test_llamas_q_and_k_are_put_back_in_order(write_gguf: Any, architecture: str) -> None:
    q = RNG.standard_normal((HIDDEN, HIDDEN), dtype=np.float32)
    k = RNG.standard_normal((HIDDEN // 2, HIDDEN), dtype=np.float32)
    q_bias, k_bias = q[:, 0].copy(), k[:, 0].copy()
    path = write_gguf(
        architecture,
        tensors={
            "blk.0.attn_q.weight": converted(q, HEADS),
            "blk.0.attn_k.weight": converted(k, KV_HEADS),
            "blk.0.attn_v.weight": k,
            "blk.0.attn_q.bias": converted(q_bias, HEADS),
            "blk.0.attn_k.bias": converted(k_bias, KV_HEADS),
            "blk.0.attn_v.bias": k_bias,
        },
    )
    source = GGUFSource(GGUFFile(path))
    for name, expected in (("q", q), ("k", k), ("v", k)):
        assert np.array_equal(source.read(f"model.layers.0.self_attn.{name}_proj.weight").numpy(), expected)
    for name, expected in (("q", q_bias), ("k", k_bias), ("v", k_bias)):
        assert np.array_equal(source.read(f"model.layers.0.self_attn.{name}_proj.bias").numpy(), expected)


def test_packed_rows_are_put_back_exactly(write_gguf: Any) -> None:
    data_type = gguf.GGMLQuantizationType.Q5_1
    q = RNG.standard_normal((HIDDEN, HIDDEN), dtype=np.float32)
    data = gguf.quants.quantize(converted(q, HEADS), data_type)
    source = GGUFSource(GGUFFile(write_gguf(packed={"blk.0.attn_q.weight": (data, data_type)})))
    weight = load_weight(source, "model.layers.0.self_attn.q_proj")
    assert weight.format.name == "q5_1"
    expected = gguf.quants.dequantize(gguf.quants.quantize(q, data_type), data_type)
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), expected)


def test_qwens_rows_stay_as_they_are(write_gguf: Any) -> None:
    norm = np.ones(16, dtype=np.float32)
    path = write_gguf("qwen3", tensors={"blk.0.attn_q_norm.weight": norm, "blk.0.attn_k_norm.weight": norm})
    file = GGUFFile(path)
    source = GGUFSource(file)
    assert torch.equal(source.read("model.layers.0.self_attn.q_proj.weight"), file.read("blk.0.attn_q.weight"))
    assert source.tensors["model.layers.0.self_attn.k_norm.weight"].shape == (16,)


def test_rope_factors_and_head_are_found(write_gguf: Any) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    head = RNG.standard_normal((40, 64), dtype=np.float32)
    source = GGUFSource(GGUFFile(write_gguf(tensors={"rope_freqs.weight": factors, "output.weight": head})))
    assert np.array_equal(source.read("rope_freqs.weight").numpy(), factors)
    assert np.array_equal(source.read("lm_head.weight").numpy(), head)
    source.release("lm_head.weight")
    assert np.array_equal(source.read("lm_head.weight").numpy(), head)


def test_unknown_architecture_lists_the_known_ones(write_gguf: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'qwen33'.*llama.*qwen2.*Did you mean 'qwen3'"):
        GGUFSource(GGUFFile(write_gguf("qwen33")))


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_sinks.weight", "mm.0.weight"]
)
def test_tensors_that_would_be_left_out_are_refused(write_gguf: Any, name: str) -> None:
    path = write_gguf(tensors={name: np.ones(16, dtype=np.float32)})
    with pytest.raises(UnsupportedModelError, match=name):
        GGUFSource(GGUFFile(path))


def test_rows_that_are_no_whole_heads(write_gguf: Any) -> None:
    path = write_gguf(tensors={"blk.0.attn_q.weight": np.ones((60, 64), dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"q_proj.*60 rows.*4 heads"):
        GGUFSource(GGUFFile(path)).read("model.layers.0.self_attn.q_proj.weight")


def test_missing_tensor_is_named(write_gguf: Any) -> None:
    with pytest.raises(CheckpointError, match="lm_head"):
        GGUFSource(GGUFFile(write_gguf())).read("lm_head.weight")
