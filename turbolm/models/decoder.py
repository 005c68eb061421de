"""The one decoder: built from a `DecoderSpec`, it runs every model family.

t  tokens of the step    h  hidden size    r  rows whose logits are wanted    v  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from turbolm.cache.spec import CacheSpec
from turbolm.kv import KvFormat, KvShape
from turbolm.layers.attention import Attention
from turbolm.layers.linear import Linear
from turbolm.layers.mlp import GatedMlp
from turbolm.layers.rope import Factors, RopeSpec, rope_table
from turbolm.models.loader import Loader
from turbolm.models.spec import DecoderSpec, LayerSpec
from turbolm.ops import LayerCache, Ops, PreparedLinear, RopeTable
from turbolm.types import Batch


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: Tensor  # [h] float32
    attention: Attention
    mlp_norm: Tensor  # [h] float32
    mlp: GatedMlp


class Decoder:
    """A loaded model. A step calls nothing but ops on activations, so that a backend may record it."""

    def __init__(
        self,
        spec: DecoderSpec,
        ops: Ops,
        embedding: PreparedLinear,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        head: PreparedLinear,
    ) -> None:
        self.spec = spec
        self.ops = ops
        self.embedding = embedding
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.head = head

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """One step: stores the new tokens' keys and values in `caches` (one per layer) and returns
        float32 logits [r, v] of the rows `batch.logit_rows`."""
        return self.logits(self._run(batch, caches, batch.logit_rows), batch)

    def hidden_states(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """The step as far as the final norm → [t, h]."""
        return self._run(batch, caches, None)

    def _run(self, batch: Batch, caches: Sequence[LayerCache], rows_r: Tensor | None) -> Tensor:
        """`hidden_states`; with rows_r, of these rows alone: nothing reads the others after the last layer's keys
        and values, so what follows those is left out (3% of a prompt's time with 32 layers)."""
        ops, eps, adapters = self.ops, self.spec.norm_eps, batch.adapters
        residual = ops.embedding(batch.token_ids, self.embedding, self.spec.embedding_scale)
        x = ops.rms_norm(residual, self.layers[0].attention_norm, eps)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for layer, cache, next_norm in zip(self.layers, caches, next_norms, strict=True):
            x = layer.attention.heads(x, batch, cache)
            if layer is self.layers[-1] and rows_r is not None and rows_r.shape[0] < batch.num_tokens:
                x, residual = x[rows_r], residual[rows_r]
                adapters = None if adapters is None else adapters[rows_r]
            x = layer.attention.output(x, adapters)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.mlp(x, adapters)
            x, residual = ops.add_rms_norm(x, residual, next_norm, eps)
        return x

    def logits(self, x_th: Tensor, batch: Batch) -> Tensor:
        """float32 [r, v] of the rows `batch.logit_rows` of the hidden states; x_th may be these rows alone."""
        return self.ops.logits(x_th, batch, self.head, self.spec.logit_softcap)


def kv_layers(spec: DecoderSpec) -> tuple[KvShape, ...]:
    """What each layer keeps per token."""
    attentions = (layer.attention for layer in spec.layers)
    return tuple(KvShape(a.num_kv_heads, a.head_dim, a.v_head_dim) for a in attentions)


def vocabulary_names(spec: DecoderSpec) -> frozenset[str]:
    """The modules of embedding and head."""
    return frozenset(name for name in (spec.embedding, spec.head) if name is not None)


def cache_spec(spec: DecoderSpec, kv: KvFormat) -> CacheSpec:
    """What the model keeps per token, stored as `kv` says."""
    return CacheSpec(kv_layers(spec), kv)


def load_decoder(spec: DecoderSpec, loader: Loader, max_context: int) -> Decoder:
    """Build the model from a checkpoint. Raises CheckpointError where tensors are missing, left over
    or of another shape than the config implies."""
    ropes: dict[RopeSpec, RopeTable] = {}  # layers with the same rotation share one table
    embedding = loader.embedding(spec.embedding, (spec.vocab_size, spec.hidden_size))
    layers = [load_layer(layer, spec, loader, ropes, max_context) for layer in spec.layers]
    final_norm = loader.vector(f"{spec.final_norm}.weight", spec.hidden_size)
    if spec.head is None:
        head = embedding
    else:
        head = loader.linear([spec.head], (spec.vocab_size, spec.hidden_size), has_bias=False)
    tied_copy = ("lm_head", "output") if spec.head is None else ()
    loader.finish(ignored=tied_copy)
    return Decoder(spec, loader.ops, embedding, layers, final_norm, head)


def load_layer(
    layer: LayerSpec, spec: DecoderSpec, loader: Loader, ropes: dict[RopeSpec, RopeTable], max_context: int
) -> DecoderLayer:
    """One layer; `ropes` are the tables that other layers made, and takes this one's."""
    ops, hidden = loader.ops, spec.hidden_size
    names, attention, mlp = layer.attention_names, layer.attention, layer.mlp
    qkv = loader.linear(names.qkv, (attention.qkv_width, hidden), names.has_qkv_bias, names.qkv_rows)
    out_width = attention.num_heads * attention.v_head_dim
    output = loader.linear([names.output], (hidden, out_width), names.has_output_bias)
    q_norm = None if names.q_norm is None else loader.vector(f"{names.q_norm}.weight", attention.head_dim)
    k_norm = None if names.k_norm is None else loader.vector(f"{names.k_norm}.weight", attention.head_dim)
    gate_up = loader.linear([mlp.gate, mlp.up], (2 * mlp.width, hidden), mlp.has_bias)
    down = loader.linear([mlp.down], (hidden, mlp.width), mlp.has_bias)
    rope = None if layer.rope is None else _rope(layer.rope, loader, ropes, max_context)
    return DecoderLayer(
        loader.vector(f"{layer.attention_norm}.weight", hidden),
        Attention(ops, attention, Linear(ops, qkv), Linear(ops, output), rope, q_norm, k_norm, spec.norm_eps),
        loader.vector(f"{layer.mlp_norm}.weight", hidden),
        GatedMlp(ops, Linear(ops, gate_up), Linear(ops, down), mlp.activation),
    )


def _rope(spec: RopeSpec, loader: Loader, ropes: dict[RopeSpec, RopeTable], max_context: int) -> RopeTable:
    if spec not in ropes:
        read = spec
        if isinstance(spec.scaling, Factors):
            values = loader.vector(spec.scaling.tensor, spec.rotary_dim // 2)
            read = replace(spec, factors=tuple(values.tolist()))
        ropes[spec] = rope_table(read, max_context, loader.ops.device)
    return ropes[spec]
