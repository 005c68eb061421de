"""Llama and what is computed like it: Llama 1 to 3.3, SmolLM2, Yi, Mistral, Qwen 2, 2.5 and 3, InternLM 3."""

from __future__ import annotations

from collections.abc import Mapping

from turbolm.errors import CheckpointError
from turbolm.layers.rope import RopeSpec
from turbolm.models.config_reader import ConfigReader
from turbolm.models.spec import AttentionNames, DecoderSpec, LayerSpec, MlpSpec
from turbolm.ops import AttentionSpec


def llama_like(
    read: ConfigReader,
    family: str,
    *,
    has_qkv_bias: bool = False,
    has_output_bias: bool = False,
    has_mlp_bias: bool = False,
    has_qk_norm: bool = False,
    windows: tuple[int | None, ...] = (),
    default_theta: float | None = 10000.0,
) -> DecoderSpec:
    """The spec of a model with Llama's module names. `windows`: each layer's attention window; empty: none."""
    num_heads, num_kv_heads, head_dim = read.heads()
    theta, scaling = read.rope(default_theta)
    width, activation = read.size("intermediate_size"), read.activation()
    num_layers = read.size("num_hidden_layers")
    windows = windows or (None,) * num_layers

    def layer(i: int) -> LayerSpec:
        prefix = f"model.layers.{i}"
        attention = f"{prefix}.self_attn"
        return LayerSpec(
            attention=AttentionSpec(num_heads, num_kv_heads, head_dim, head_dim, head_dim**-0.5, windows[i]),
            attention_names=AttentionNames(
                qkv=tuple(f"{attention}.{name}_proj" for name in "qkv"),
                output=f"{attention}.o_proj",
                q_norm=f"{attention}.q_norm" if has_qk_norm else None,
                k_norm=f"{attention}.k_norm" if has_qk_norm else None,
                has_qkv_bias=has_qkv_bias,
                has_output_bias=has_output_bias,
            ),
            rope=RopeSpec(head_dim, theta, scaling),
            mlp=MlpSpec(
                width,
                activation,
                gate=f"{prefix}.mlp.gate_proj",
                up=f"{prefix}.mlp.up_proj",
                down=f"{prefix}.mlp.down_proj",
                has_bias=has_mlp_bias,
            ),
            attention_norm=f"{prefix}.input_layernorm",
            mlp_norm=f"{prefix}.post_attention_layernorm",
        )

    spec = DecoderSpec(
        family=family,
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        max_context=read.size("max_position_embeddings"),
        norm_eps=read.number("rms_norm_eps"),
        layers=tuple(layer(i) for i in range(num_layers)),
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head=None if read.flag("tie_word_embeddings", False) else "lm_head",
    )
    read.finish(f"model family '{family}'")
    return spec


def llama(config: Mapping[str, object]) -> DecoderSpec:
    read = ConfigReader(config)
    bias = read.flag("attention_bias", False)
    mlp_bias = read.flag("mlp_bias", False)
    return llama_like(read, "llama", has_qkv_bias=bias, has_output_bias=bias, has_mlp_bias=mlp_bias)


def mistral(config: Mapping[str, object]) -> DecoderSpec:
    read = ConfigReader(config)
    window = read.size("sliding_window") if read.has("sliding_window") else None
    return llama_like(read, "mistral", windows=(window,) * read.size("num_hidden_layers"))


def _qwen_windows(read: ConfigReader) -> tuple[int | None, ...]:
    """Qwen's windows: by `layer_types`, or from layer `max_window_layers` on."""
    num_layers, types = read.size("num_hidden_layers"), read.texts("layer_types")
    read.skip("sliding_window")
    if not read.flag("use_sliding_window", False):
        return ()
    window = read.size("sliding_window")
    if types is None:
        first = read.size("max_window_layers")
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(types) != num_layers:
        raise CheckpointError(f"config.json names {len(types)} layer_types for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def qwen2(config: Mapping[str, object]) -> DecoderSpec:
    read = ConfigReader(config)
    return llama_like(read, "qwen2", has_qkv_bias=True, windows=_qwen_windows(read))


def qwen3(config: Mapping[str, object]) -> DecoderSpec:
    read = ConfigReader(config)
    bias = read.flag("attention_bias", False)
    windows = _qwen_windows(read)
    return llama_like(read, "qwen3", has_qkv_bias=bias, has_output_bias=bias, has_qk_norm=True, windows=windows)
