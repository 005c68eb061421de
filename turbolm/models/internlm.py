"""InternLM 2, 2.5 and 3.

InternLM 2 packs q, k and v into one matrix `wqkv`, grouped by key/value head: the group's query
heads, then its key head, then its value head. InternLM 3 has Llama's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from turbolm.models.config_reader import ConfigReader
from turbolm.models.llama import llama_like
from turbolm.models.spec import AttentionNames, DecoderSpec, LayerSpec, MlpSpec
from turbolm.ops import AttentionSpec


def grouped_qkv_rows(spec: AttentionSpec) -> tuple[int, ...]:
    """Row numbers of a grouped `wqkv` in the order all q heads, all k heads, all v heads."""
    group = spec.num_heads // spec.num_kv_heads

    def rows(kv_head: int, first: int, count: int) -> list[int]:
        start = (kv_head * (group + 2) + first) * spec.head_dim
        return list(range(start, start + count * spec.head_dim))

    order: list[int] = []
    for first, count in ((0, group), (group, 1), (group + 1, 1)):
        for kv_head in range(spec.num_kv_heads):
            order += rows(kv_head, first, count)
    return tuple(order)


def internlm2(config: Mapping[str, object]) -> DecoderSpec:
    read = ConfigReader(config)
    bias = read.flag("bias", False)
    spec = llama_like(read, "internlm2", has_qkv_bias=bias, has_output_bias=bias)
    rows = grouped_qkv_rows(spec.layers[0].attention)

    def rename(i: int, layer: LayerSpec) -> LayerSpec:
        prefix = f"model.layers.{i}"
        names = AttentionNames(
            qkv=(f"{prefix}.attention.wqkv",),
            output=f"{prefix}.attention.wo",
            qkv_rows=rows,
            has_qkv_bias=bias,
            has_output_bias=bias,
        )
        ffn = f"{prefix}.feed_forward"
        return replace(
            layer,
            attention_names=names,
            mlp=MlpSpec(layer.mlp.width, layer.mlp.activation, gate=f"{ffn}.w1", up=f"{ffn}.w3", down=f"{ffn}.w2"),
            attention_norm=f"{prefix}.attention_norm",
            mlp_norm=f"{prefix}.ffn_norm",
        )

    return replace(
        spec,
        layers=tuple(rename(i, layer) for i, layer in enumerate(spec.layers)),
        embedding="model.tok_embeddings",
        head=None if spec.head is None else "output",
    )


def internlm3(config: Mapping[str, object]) -> DecoderSpec:
    read = ConfigReader(config)
    bias = read.flag("bias", False)
    qkv_bias = read.flag("qkv_bias", False)
    return llama_like(read, "internlm3", has_qkv_bias=qkv_bias, has_output_bias=bias, has_mlp_bias=bias)
