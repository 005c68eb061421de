"""Tiny models on disk, written without any other library, and what turbolm computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from turbolm.compress.calibration import lay_out
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import LayerCache
from turbolm.ops.reference import ReferenceOps
from turbolm.text import byte_tokenizer

HIDDEN, WIDTH, LAYERS, VOCABULARY = 64, 96, 2, 272
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
    "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "vocab_size": VOCABULARY, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
SAMPLES = [
    "The lighthouse at the end of the bay was built after three ships had been lost.", "def f(x):\n    return x + 1",
    "Der Wind ist warm und trocken.", "光合作用是植物利用阳光的过程。", "1 + 1 = 2, 2 + 2 = 4",
]  # fmt: skip


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, with some channels far larger than the others, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    kv_width = HIDDEN // config["num_attention_heads"] * config["num_key_value_heads"]
    has_bias = config.get("attention_bias") or config["model_type"] == "qwen2"

    def matrix(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=generator) * 0.15

    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], HIDDEN, generator=generator)}
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        rows = {"q_proj": HIDDEN, "k_proj": kv_width, "v_proj": kv_width, "o_proj": HIDDEN}
        for name, n in rows.items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = matrix(n, HIDDEN)
            if has_bias and (name != "o_proj" or config.get("attention_bias")):
                tensors[f"{prefix}.self_attn.{name}.bias"] = torch.randn(n, generator=generator) * 0.1
        for name, (n, k) in {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}.items():
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = matrix(n, k)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = 1 + 0.2 * torch.randn(HIDDEN, generator=generator)
            weight[::9] *= 4
            tensors[f"{prefix}.{norm}.weight"] = weight
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    return tensors


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """tiny_model(tensors={changes}, name="model", **config changes) → a model's folder, with a tokenizer."""

    def write(tensors: dict[str, Tensor] | None = None, name: str = "model", **changes: Any) -> Path:
        config = CONFIG | changes
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        all_tensors = tiny_tensors(config) | (tensors or {})
        save_file({key: tensor.bfloat16() for key, tensor in all_tensors.items()}, folder / "model.safetensors")
        tokenizer = byte_tokenizer()
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
        settings = {"eos_token": "<|im_end|>", "chat_template": tokenizer.chat_templates["default"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return write


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SAMPLES), encoding="utf-8")
    return path


def compute_logits(folder: Path, sequences: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [t, vocabulary] of all tokens, by the reference ops."""
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    ops = ReferenceOps(torch.device("cpu"), dtype)
    loader = Loader(checkpoint.source, ops, packing=checkpoint.packing)
    decoder = load_decoder(spec, loader, 128)
    batch = lay_out(sequences, ops.device)
    caches = []
    for layer in spec.layers:
        shape = (batch.num_sequences, layer.attention.num_kv_heads, batch.max_context, layer.attention.head_dim)
        caches.append(LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)))
    return decoder.forward(batch, caches)


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    return compute_logits
