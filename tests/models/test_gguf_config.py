"""config.json out of GGUF metadata: the families' strict readers take it as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.models.gguf import GGUFFile
from turbolm.models.gguf_config import gguf_config, gguf_generation_config
from turbolm.models.registry import decoder_spec

VECTOR = np.ones(64, dtype=np.float32)
HALF = np.ones(32, dtype=np.float32)
QKV_BIASES = {"blk.0.attn_q.bias": VECTOR, "blk.0.attn_k.bias": HALF, "blk.0.attn_v.bias": HALF}
OUT_BIAS = {"blk.0.attn_output.bias": VECTOR}


def config_of(write_gguf: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    return gguf_config(GGUFFile(write_gguf(*arguments, **options)))


def test_llama(write_gguf: Any) -> None:
    config = config_of(write_gguf, metadata={"llama.rope.freq_base": 100000.0, "tokenizer.ggml.eos_token_id": 2})
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": 40,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("architecture", "tensors", "family", "biases"),
    [
        ("llama", {}, "llama", (False, False)),
        ("llama", QKV_BIASES | OUT_BIAS, "llama", (True, True)),
        ("llama", QKV_BIASES, "internlm3", (True, False)),
        ("internlm2", {}, "llama", (False, False)),
        ("qwen2", QKV_BIASES, "qwen2", (True, False)),
        ("qwen3", {}, "qwen3", (False, False)),
    ],
)
def test_families_take_the_config(
    write_gguf: Any, architecture: str, tensors: Any, family: str, biases: tuple[bool, bool]
) -> None:
    spec = decoder_spec(config_of(write_gguf, architecture, tensors=tensors))
    names = spec.layers[0].attention_names
    assert (spec.family, (names.has_qkv_bias, names.has_output_bias)) == (family, biases)


def test_separate_head(write_gguf: Any) -> None:
    config = config_of(write_gguf, tensors={"output.weight": np.ones((40, 64), dtype=np.float32)})
    assert config["tie_word_embeddings"] is False


def test_head_size_and_equal_head_counts_by_layer(write_gguf: Any) -> None:
    config = config_of(
        write_gguf,
        metadata={
            "llama.attention.key_length": 32,
            "llama.attention.value_length": 32,
            "llama.rope.dimension_count": 32,
            "llama.attention.head_count_kv": [2, 2],
        },
    )
    assert (config["head_dim"], config["num_key_value_heads"]) == (32, 2)
    assert "partial_rotary_factor" not in config


def test_a_window_makes_it_mistral(write_gguf: Any) -> None:
    spec = decoder_spec(config_of(write_gguf, metadata={"llama.attention.sliding_window": 32}))
    assert (spec.family, spec.layers[0].attention.window) == ("mistral", 32)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling(write_gguf: Any, metadata: dict[str, Any], expected: Any) -> None:
    config = config_of(write_gguf, metadata={f"llama.rope.scaling.{key}": value for key, value in metadata.items()})
    assert config["rope_scaling"] == expected
    decoder_spec(config)


def test_llama3_scaling_is_in_a_tensor(write_gguf: Any) -> None:
    config = config_of(write_gguf, tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert config["rope_scaling"] == {"rope_type": "factors", "tensor": "rope_freqs.weight"}
    decoder_spec(config)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_keys_are_named(write_gguf: Any, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"llama.{key}"):
        config_of(write_gguf, metadata={f"llama.{key}": None})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": "one"}, "llama.block_count is 'one'; int"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.attention.head_count_kv": 3}, "4 heads can't share 3"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.embedding_length": 128}, "token_embd.weight.*hidden size is 128"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    ],
)
def test_broken_values_are_named(write_gguf: Any, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(write_gguf, metadata=metadata)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.expert_count": 8}, {}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, {}, "longrope"),
        ({"llama.attention.head_count_kv": [2, 4]}, {}, "differs between layers"),
        ({}, OUT_BIAS | {"blk.0.ffn_gate.bias": np.ones(96, dtype=np.float32)} | QKV_BIASES, None),
        ({}, OUT_BIAS, "biases"),
    ],
)
def test_models_that_turbolm_would_compute_wrongly(
    write_gguf: Any, metadata: dict[str, Any], tensors: Any, message: str | None
) -> None:
    if message is None:
        assert decoder_spec(config_of(write_gguf, metadata=metadata, tensors=tensors)).layers[0].mlp.has_bias
        return
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(write_gguf, metadata=metadata, tensors=tensors)


def test_generation_config_has_every_end_and_the_sampling_defaults(write_gguf: Any) -> None:
    path = write_gguf(
        metadata={
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 7,
            "tokenizer.ggml.eom_token_id": 2,
            "general.sampling.temp": 0.6,
            "general.sampling.top_k": 20,
        }
    )
    assert gguf_generation_config(GGUFFile(path)) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "temperature": 0.6,
        "top_k": 20,
    }
