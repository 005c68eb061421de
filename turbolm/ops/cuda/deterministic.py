"""The GPU backend whose answers don't depend, in any bit, on what else is in the batch, on how prompts were chunked,
and on what the prefix cache held.

Every op computes a row alike whatever is beside it: products and attention by `ops/triton/fixed.py`, norms and rotation
with as many warps for any number of rows. What remains (embedding, activation, sampling) is by row anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turbolm.ops.cuda.ops import CudaOps
from turbolm.ops.cuda.weights import DenseLinear, EightBitLinear, PackedLinear
from turbolm.ops.triton import fixed, rows
from turbolm.ops.triton.unpack import unpack_int4

if TYPE_CHECKING:
    from turbolm.ops import AttentionSpec, LayerCache, PreparedLinear, RopeTable
    from turbolm.types import Batch

_NORM_WARPS = 8
_HEADS = 4  # per program of the rotation


class DeterministicCudaOps(CudaOps):
    """`Ops` on one GPU, in bfloat16 or float16, with keys and values in the same. Not thread-safe."""

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        assert isinstance(weight, PackedLinear)
        out = self._empty(x_tk.shape[0], weight.out_features)
        _multiply(x_tk, weight, out)
        return out

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x_th)
        rows.rms_norm(x_th, weight_h, eps, out, num_warps=_NORM_WARPS)
        return out

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(residual_th)
        rows.add_rms_norm(x_th, residual_th, weight_h, eps, out, num_warps=_NORM_WARPS)
        return out, residual_th

    def rotary_store(
        self,
        qkv_tw: Tensor,
        batch: Batch,
        cache: LayerCache,
        spec: AttentionSpec,
        rope: RopeTable | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        rows.rotary_store(
            qkv_tw, batch.positions, batch.slots, cache, spec, rope, q_norm, k_norm, eps, qkv_tw, heads=_HEADS
        )
        return qkv_tw

    def attention(self, qkv_tw: Tensor, batch: Batch, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        out = self._empty(qkv_tw.shape[0], spec.num_heads * spec.v_head_dim)
        first, starts = batch.num_decodes, batch.query_start
        tables, contexts = batch.block_tables, batch.context_lens
        if first:
            fixed.attend(
                qkv_tw, starts[: first + 1], None, tables[:first], contexts[:first], batch.max_context, cache, spec, out
            )
        if batch.chunks:
            counts = [num_rows for _, num_rows, _ in batch.chunks]
            fixed.attend(
                qkv_tw, starts[first:], counts, tables[first:], contexts[first:], batch.max_context, cache, spec, out
            )
        return out

    def logits(self, x_th: Tensor, batch: Batch, weight: PreparedLinear, softcap: float | None = None) -> Tensor:
        assert isinstance(weight, PackedLinear)
        num_rows = batch.logit_rows.shape[0]
        x = x_th if num_rows == batch.num_tokens else x_th[batch.logit_rows]
        if self._logits is None or self._logits.shape[0] < num_rows:
            self._logits = torch.empty(num_rows, weight.out_features, dtype=torch.float32, device=self.device)
        logits = self._logits[:num_rows]
        _multiply(x, weight, logits)
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _multiply(x_tk: Tensor, weight: PackedLinear, out_tn: Tensor) -> None:
    """x @ weight.T + bias. Activations keep 16 bits whatever the weights have."""
    if isinstance(weight, DenseLinear):
        fixed.multiply(x_tk, weight.weight, None, weight.bias, out_tn)
    elif isinstance(weight, EightBitLinear):
        fixed.multiply(x_tk, weight.matrix.codes, weight.matrix.scales, weight.bias, out_tn)
    else:
        n, k = weight.matrix.shape
        unpacked = x_tk.new_empty((2, n // 2, k))
        unpack_int4(weight.matrix.units, unpacked)
        ordered = x_tk if weight.columns is None else x_tk.index_select(1, weight.columns)
        fixed.multiply(ordered, unpacked.view(n, k), None, weight.bias, out_tn)
