"""Tiny random checkpoints in Hugging Face's layout, and what transformers computes with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Tiny:
    """A model class of transformers with config fields that differ from `SIZES`."""

    family: str  # LlamaConfig, LlamaForCausalLM: "Llama"
    fields: dict[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.family}Config")(**SIZES | self.fields)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            # Norms and biases of real models are neither 1 nor 0.
            scale = 0.3 if "norm" in name or "bias" in name else 0.12
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, scale)
        return model

    def save(self, folder: Path, seed: int = 0) -> PreTrainedModel:
        model = self.model(seed)
        model.save_pretrained(folder)
        return model


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip

TINY_MODELS = {
    "llama": Tiny("Llama"),
    "llama-tied": Tiny("Llama", {"tie_word_embeddings": True}),
    "llama-biases": Tiny("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": Tiny("Llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "llama-linear": Tiny("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-dynamic": Tiny("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-3": Tiny("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": Tiny("Llama", {"rope_parameters": YARN}),
    "mistral": Tiny("Mistral", {"sliding_window": None}),
    "mistral-window": Tiny("Mistral", {"sliding_window": 7}),
    "qwen2": Tiny("Qwen2"),
    "qwen2-window": Tiny("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": Tiny("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-bias": Tiny("Qwen3", {"head_dim": 16, "attention_bias": True}),
}


def save_as_internlm2(folder: Path, fields: dict[str, Any] | None = None) -> PreTrainedModel:
    """An InternLM 2 checkpoint that computes what the returned Llama model does: its grouped, packed
    `wqkv` is made of Llama's q, k and v."""
    bias = bool((fields or {}).get("attention_bias", False))
    model = Tiny("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, **(fields or {})}).save(
        folder / "llama"
    )
    config = model.config
    tensors = load_file(folder / "llama" / "model.safetensors")
    renamed = {"model.norm.weight": tensors["model.norm.weight"]}
    renamed["model.tok_embeddings.weight"] = tensors["model.embed_tokens.weight"]
    if not config.tie_word_embeddings:
        renamed["output.weight"] = tensors["lm_head.weight"]
    names = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    groups = config.num_key_value_heads
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        for kind in ("weight", "bias") if bias else ("weight",):
            parts = [tensors[f"{prefix}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]  # [kv head, its rows, ...]
            renamed[f"{prefix}.attention.wqkv.{kind}"] = torch.cat(grouped, dim=1).flatten(0, 1).contiguous()
        for old, new in names.items():
            for kind in ("weight", "bias"):
                if f"{prefix}.{old}.{kind}" in tensors:
                    renamed[f"{prefix}.{new}.{kind}"] = tensors[f"{prefix}.{old}.{kind}"]
    save_file(renamed, folder / "model.safetensors")
    written = {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_act": "silu", "bias": bias,
        "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 16,
        "tie_word_embeddings": config.tie_word_embeddings, "auto_map": {"AutoConfig": "configuration_internlm2.X"},
        **{name: getattr(config, name) for name in SIZES},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return model


def save_as_internlm3(folder: Path) -> PreTrainedModel:
    """An InternLM 3 checkpoint that computes what the returned Llama model does."""
    model = Tiny("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}).save(folder)
    written = json.loads((folder / "config.json").read_text())
    del written["attention_bias"], written["mlp_bias"]
    written |= {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "qkv_bias": True, "bias": True}
    (folder / "config.json").write_text(json.dumps(written))
    return model
