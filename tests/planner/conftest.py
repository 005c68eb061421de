"""Shapes and small checkpoints to plan with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

SHAPES: dict[str, dict[str, Any]] = {
    "internlm2-20b": {
        "architectures": ["InternLM2ForCausalLM"], "hidden_size": 6144, "intermediate_size": 16384,
        "num_hidden_layers": 48, "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 92544,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu",
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu",
    },
    "small": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    },
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> Callable[..., str]:
    """shape("llama-3-8b", field=value …) → the path of a folder with that config.json alone."""

    def write(name: str, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SHAPES[name] | changes))
        return str(folder)

    return write


@pytest.fixture
def small(shape: Callable[..., str]) -> Path:
    """A folder with config.json and random bfloat16 weights, in two shards."""
    folder = Path(shape("small", tie_word_embeddings=False))
    hidden, width, kv, vocabulary = 256, 512, 128, 2048
    tensors = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(2):
        prefix = f"model.layers.{i}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (width, hidden),
            f"{prefix}.mlp.up_proj.weight": (width, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, width),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    names = sorted(tensors)
    index = {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        part = names[number - 1 :: 2]
        save_file({name: torch.randn(tensors[name]).bfloat16() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
