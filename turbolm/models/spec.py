"""What a decoder is made of: the declarative spec that a model family returns.

The decoder, the KV cache and the memory plan are built from it alone. Each layer has its own
`LayerSpec`, so that layers may differ (windows, experts, head sizes).
"""

from __future__ import annotations

from dataclasses import dataclass

from turbolm.layers.rope import RopeSpec
from turbolm.ops import Activation, AttentionSpec


@dataclass(frozen=True, slots=True)
class AttentionNames:
    """Module names of one layer's attention in the checkpoint."""

    qkv: tuple[str, ...]  # q, k, v; or one packed matrix
    output: str
    q_norm: str | None = None
    k_norm: str | None = None
    qkv_rows: tuple[int, ...] | None = None  # rows of the packed matrix in the order all q, all k, all v
    has_qkv_bias: bool = False
    has_output_bias: bool = False


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A gated feed-forward layer and its module names."""

    width: int
    activation: Activation
    gate: str
    up: str
    down: str
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: norm, attention, norm, feed-forward."""

    attention: AttentionSpec
    attention_names: AttentionNames
    rope: RopeSpec | None
    mlp: MlpSpec
    attention_norm: str
    mlp_norm: str


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer with pre-normalization (RMSNorm)."""

    family: str
    vocab_size: int
    hidden_size: int
    max_context: int  # what it was trained (or its rope scaling made) for
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    embedding: str
    final_norm: str
    head: str | None  # None: tied to the embedding
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
