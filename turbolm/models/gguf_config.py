"""A GGUF file's metadata as Hugging Face's config.json and generation_config.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.models.gguf import GGUFFile
from turbolm.models.gguf_source import ROPE_FACTORS, architecture_of, head_count

_MAX_SIZE = 1 << 31

#: Metadata key → key of generation_config.json.
_SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The model's config.json. One value has no counterpart there: `rope_scaling` of
    {"rope_type": "factors", "tensor": name}, where that tensor's numbers divide the inverse frequencies.

    Raises CheckpointError for missing or broken keys, UnsupportedModelError for models that turbolm
    doesn't compute.
    """
    architecture = architecture_of(file)
    metadata = _Metadata(file)
    if metadata.integer("expert_count", 0):
        raise UnsupportedModelError(f"{file.path} has a mixture of experts; turbolm reads only dense GGUF models")
    hidden_size = metadata.integer("embedding_length")
    num_heads = head_count(file, "head_count")
    if num_heads is None:
        raise metadata.missing("attention.head_count")
    num_kv_heads = head_count(file, "head_count_kv") or num_heads
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{file.path}: {num_heads} heads can't share {num_kv_heads} key-value heads")
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    config: dict[str, Any] = {
        "architectures": [architecture.hf_name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
        "max_position_embeddings": metadata.integer("context_length"),
        "vocab_size": _vocab_size(file, hidden_size),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        config["v_head_dim"] = metadata.integer("attention.value_length")
    rotary_dim = metadata.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    config |= _biases(file, architecture.model_type)
    if window := metadata.integer("attention.sliding_window", 0):
        if config["architectures"] != ["LlamaForCausalLM"]:
            raise UnsupportedModelError(
                f"{file.path}: a window of {window} tokens, but not in which layers; get the safetensors model"
            )
        # Llama has no windows: this is Mistral.
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return config | _token_ids(file)


def gguf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """generation_config.json: every token that ends an answer, and sampling defaults where given."""
    metadata = _Metadata(file)
    config: dict[str, Any] = {}
    ids = _token_ids(file)
    if "bos_token_id" in ids:
        config["bos_token_id"] = ids["bos_token_id"]
    ends = [ids.get("eos_token_id"), metadata.token_id("eot_token_id"), metadata.token_id("eom_token_id")]
    unique_ends = list(dict.fromkeys(end for end in ends if end is not None))
    if unique_ends:
        config["eos_token_id"] = unique_ends if len(unique_ends) > 1 else unique_ends[0]
    for key, name in _SAMPLING_KEYS.items():
        if key in file.metadata:
            config[name] = metadata.value(key, None, (int, float))
    return config


class _Metadata:
    """Typed values by key; keys without a known first part are the architecture's own."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.prefix = f"{file.metadata.get('general.architecture')}."

    def missing(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: the metadata lack {self.prefix}{key}, which the model needs")

    def value(self, key: str, default: object, types: tuple[type, ...]) -> Any:
        """The value of a full key; `default` where it is absent."""
        value = self.file.metadata.get(key, default)
        if value is not None and type(value) not in types:
            names = " or ".join(item.__name__ for item in types)
            raise CheckpointError(f"{self.file.path}: {key} is {str(value)[:60]!r}; {names} is expected")
        return _shorten(value) if isinstance(value, float) else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A size: at least 1, or the default where the key is absent."""
        value = self.value(self.prefix + key, default, (int,))
        if value is None:
            raise self.missing(key)
        if value != default and not 0 < value < _MAX_SIZE:
            raise CheckpointError(f"{self.file.path}: {self.prefix}{key} is {value}; 1 to {_MAX_SIZE} is possible")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(self.prefix + key, default, (float, int))
        if value is None:
            raise self.missing(key)
        if not 0 < value < 1e30:
            raise CheckpointError(f"{self.file.path}: {self.prefix}{key} is {value}; a positive number is expected")
        return float(value)

    def token_id(self, key: str) -> int | None:
        value: int | None = self.value(f"tokenizer.ggml.{key}", None, (int,))
        return value


def _shorten(value: float) -> float:
    """A float32's shortest decimal: 1e-05, not 9.999999747378752e-06, which is the same float32."""
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def _rope_scaling(metadata: _Metadata) -> dict[str, Any] | None:
    prefix = metadata.prefix
    kind = metadata.value(f"{prefix}rope.scaling.type", None, (str,))
    old_factor = metadata.value(f"{prefix}rope.scale_linear", None, (float,))
    if kind is None and old_factor not in (None, 1.0):
        kind = "linear"
    has_factors = ROPE_FACTORS in metadata.file.tensors
    if kind in (None, "none"):
        return {"rope_type": "factors", "tensor": ROPE_FACTORS} if has_factors else None
    if kind not in ("linear", "yarn") or has_factors:
        extra = f" with the tensor {ROPE_FACTORS}" if has_factors else ""
        raise UnsupportedModelError(
            f"{metadata.file.path} scales its rotary positions by '{kind}'{extra}; turbolm knows linear, yarn, "
            f"or {ROPE_FACTORS} alone"
        )
    factor = metadata.number("rope.scaling.factor", old_factor)
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    return _yarn_scaling(metadata, factor)


def _yarn_scaling(metadata: _Metadata, factor: float) -> dict[str, Any]:
    context = metadata.integer("rope.scaling.original_context_length", metadata.integer("context_length"))
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    for name in ("beta_fast", "beta_slow"):
        if f"{metadata.prefix}rope.scaling.yarn_{name}" in metadata.file.metadata:
            scaling[name] = metadata.number(f"rope.scaling.yarn_{name}")
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if metadata.number(f"rope.scaling.{name}", 1.0) != 1.0:
            raise UnsupportedModelError(f"{metadata.file.path}: rope.scaling.{name} other than 1 is not supported")
    return scaling


def _vocab_size(file: GGUFFile, hidden_size: int) -> int:
    """Rows of the embedding, which may be more than there are tokens."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight; it holds no whole model")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        raise CheckpointError(
            f"{file.path}: token_embd.weight has shape {list(embedding.shape)}, the hidden size is {hidden_size}"
        )
    return embedding.shape[0]


def _biases(file: GGUFFile, model_type: str) -> dict[str, Any]:
    """The config fields that say which projections have a bias."""
    qkv, out, mlp = (f"blk.0.{module}.bias" in file.tensors for module in ("attn_q", "attn_output", "ffn_gate"))
    if model_type == "qwen2":  # always q, k and v: there is no field
        return {}
    if qkv == out:
        return {"attention_bias": qkv, "mlp_bias": mlp}
    if model_type == "llama" and out == mlp:  # Llama's attention_bias covers o_proj: this is InternLM 3
        return {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "qkv_bias": qkv, "bias": out}
    raise UnsupportedModelError(
        f"{file.path}: no known {model_type} model has biases in q, k, v: {qkv}, o_proj: {out}, mlp: {mlp}"
    )


def _token_ids(file: GGUFFile) -> dict[str, int]:
    metadata = _Metadata(file)
    ids = {
        "bos_token_id": metadata.token_id("bos_token_id"),
        "eos_token_id": metadata.token_id("eos_token_id"),
        "pad_token_id": metadata.token_id("padding_token_id"),
    }
    return {name: token_id for name, token_id in ids.items() if token_id is not None}
