from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turbolm.bench import products
from turbolm.bench.products import Product, products_of, time_product
from turbolm.models.checkpoint import open_checkpoint
from turbolm.ops.cpu import library
from turbolm.quant import FORMATS
from turbolm.weights import Weight


def test_products_of_the_default_model(smollm2_path: Path):
    """Together they are all matrices of the file; the norms are the rest."""
    checkpoint = open_checkpoint(smollm2_path)
    found = products_of(checkpoint)
    shapes = {product.name: (product.count, product.formats, product.shape) for product in found}
    assert shapes == {
        "q_proj, k_proj, v_proj": (30, "q4_1", (960, 576)),
        "o_proj": (30, "q4_1", (576, 576)),
        "gate_proj, up_proj": (30, "q4_1", (3072, 576)),
        "down_proj": (30, "q4_1", (576, 1536)),
        "head (tied)": (1, "q8_0", (49152, 576)),
    }
    num_bytes = sum(product.count * sum(weight.num_bytes for weight in product.weights) for product in found)
    assert num_bytes == checkpoint.total_weight_bytes - 61 * 576 * 4


def test_an_untied_head_is_a_product_and_the_embedding_none(tmp_path: Path):
    hidden, width, vocabulary = 32, 64, 96
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"model.layers.0.self_attn.{name}"] = (hidden, hidden)
    for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        shapes[f"model.layers.0.mlp.{name}"] = shape
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        shapes[name] = (hidden,)
    tensors = {f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary,
        "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [product.name for product in products_of(open_checkpoint(tmp_path))]
    assert "lm_head" in names
    assert "head (tied)" not in names


def dense(n: int, k: int) -> Product:
    return Product("x", [Weight(FORMATS["bf16"], (n, k), {"data": torch.randn(n, k).to(torch.bfloat16)})])


def test_timings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "cold_bytes", lambda: 1 << 20)
    timings = time_product(dense(256, 128), (1, 16), library.Team(2), 0.01)
    assert timings is not None
    one, many = timings
    assert (one.rows, many.rows) == (1, 16)
    assert one.num_bytes == many.num_bytes == 256 * 128 * 2
    assert many.num_operations == 16 * one.num_operations == 16 * 2 * 256 * 128
    assert 0 < one.seconds < 0.1
    assert one.bytes_per_second == pytest.approx(one.num_bytes / one.seconds)


def test_a_format_without_kernels_has_no_timings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "pack", lambda weights, bias: None)
    assert time_product(dense(16, 32), (1,), library.Team(1), 0.01) is None


def test_the_timed_call_computes_the_product(monkeypatch: pytest.MonkeyPatch):
    product = dense(48, 64)
    packed = products.pack(product.weights, None)
    assert packed is not None
    calls = products._Calls([packed], 3, library.Team(2))
    calls()
    x, y, *_ = calls._keep
    torch.testing.assert_close(y, x @ product.weights[0].tensors["data"].float().T, rtol=1e-4, atol=1e-4)
