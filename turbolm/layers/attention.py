"""Self-attention over the paged KV cache."""

from __future__ import annotations

from torch import Tensor

from turbolm.layers.linear import Linear
from turbolm.ops import AttentionSpec, LayerCache, Ops, RopeTable
from turbolm.types import Batch


class Attention:
    """qkv projection, per-head norms, rotation, KV store, attention, output projection.

    q_norm, k_norm: float32 [head_dim] RMSNorm weights of each head, or None."""

    def __init__(
        self,
        ops: Ops,
        spec: AttentionSpec,
        qkv: Linear,
        output: Linear,
        rope: RopeTable | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> None:
        self.ops = ops
        self.spec = spec
        self.qkv = qkv
        self.output = output
        self.rope = rope
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.eps = eps

    def __call__(self, x_th: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        return self.output(self.heads(x_th, batch, cache), batch.adapters)

    def heads(self, x_th: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """All up to the output projection, which a model's last layer does for some of the rows alone."""
        qkv = self.qkv(x_th, batch.adapters)
        qkv = self.ops.rotary_store(qkv, batch, cache, self.spec, self.rope, self.q_norm, self.k_norm, self.eps)
        return self.ops.attention(qkv, batch, cache, self.spec)
