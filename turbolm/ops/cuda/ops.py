"""The backend for NVIDIA GPUs: which kernel runs which op.

A matrix product over few rows is not computed by `linear` itself: it hands on a `Deferred`, and the op
that takes it chooses the form that it reads at least cost (partial sums, or with the activation
applied). The partial sums of what was split over k are added up by the next kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from turbolm.ops.cuda import linear as small
from turbolm.ops.cuda.upload import Uploader
from turbolm.ops.triton import rows, sampling
from turbolm.ops.triton.attention import attention

if TYPE_CHECKING:
    from turbolm.ops import Activation, AttentionSpec, LayerCache, PreparedLinear, RopeTable
    from turbolm.types import Batch
    from turbolm.weights import Weight


_FEW_ROWS = 16  # of x, up to which turbolm's kernel is faster than cuBLAS …
_FEW_ROWS_OF_SMALL = 32  # … and with weights of at most
_LARGE = 16 << 20  # bytes


@dataclass(slots=True)
class DenseLinear:
    """Matrices stacked by output rows, in the dtype of the activations."""

    weight: Tensor  # [n, k]
    bias: Tensor | None  # [n]

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


@dataclass(slots=True)
class Deferred:
    """A matrix product that its consumer computes."""

    x_tk: Tensor
    linear: DenseLinear

    def parts(self) -> Tensor:
        """[p, t, n] float32, to be summed over p; or finished [t, n]."""
        return small.linear_parts(self.x_tk, self.linear.weight, self.linear.bias)


class CudaOps:
    """`Ops` on one GPU, in bfloat16 or float16. Not thread-safe."""

    name = "cuda"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._logits: Tensor | None = None  # [rows, v], for all steps
        self._uploader: Uploader | None = None  # while weights are loaded

    def prepare_linear(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        num_rows, in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
        stacked = torch.empty(num_rows, in_features, dtype=self.dtype, device=self.device)
        row = 0
        for weight in weights:
            self._copy(weight.dequantize(self.dtype), stacked[row : row + weight.shape[0]])
            row += weight.shape[0]
        return DenseLinear(stacked, None if bias is None else bias.to(self.device, self.dtype))

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        assert isinstance(weight, DenseLinear)
        if self._is_small(x_tk.shape[0], weight):
            return cast(Tensor, Deferred(x_tk, weight))
        return F.linear(x_tk, weight.weight, weight.bias)

    def _is_small(self, num_rows: int, weight: DenseLinear) -> bool:
        """Whether turbolm's kernel for few rows is the faster one (docs/log.md)."""
        limit = _FEW_ROWS if weight.num_bytes > _LARGE else _FEW_ROWS_OF_SMALL
        supports = small.supports(num_rows, weight.out_features, weight.in_features, self.dtype)
        return num_rows <= limit and supports

    def prepare_embedding(self, weight: Weight) -> PreparedLinear:
        return self.prepare_linear([weight], None)

    def embedding(self, token_ids_t: Tensor, table: PreparedLinear, scale: float = 1.0) -> Tensor:
        assert isinstance(table, DenseLinear)
        out = self._empty(token_ids_t.shape[0], table.in_features)
        rows.embedding(token_ids_t, table.weight, scale, out)
        return out

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x_th)
        rows.rms_norm(x_th, weight_h, eps, out)
        return out

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(residual_th)
        rows.add_rms_norm(_parts(x_th), residual_th, weight_h, eps, out)
        return out, residual_th

    def add(self, x_th: Tensor, residual_th: Tensor) -> Tensor:
        rows.add(_parts(x_th), residual_th)
        return residual_th

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
        parts = _parts(qkv_tw)
        out = self._empty(batch.num_tokens, spec.qkv_width) if parts is not qkv_tw else qkv_tw
        rows.rotary_store(parts, batch.positions, batch.slots, cache, spec, rope, q_norm, k_norm, eps, out)
        return out

    def attention(self, qkv_tw: Tensor, batch: Batch, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        out = self._empty(qkv_tw.shape[0], spec.num_heads * spec.v_head_dim)
        attention(qkv_tw, batch, cache, spec, out)
        return out

    def activate_multiply(self, gate_up_t2f: Tensor, activation: Activation) -> Tensor:
        if isinstance(gate_up_t2f, Deferred):
            product = gate_up_t2f.linear
            if product.bias is None:
                return small.linear_gated(gate_up_t2f.x_tk, product.weight, activation)
        parts = _parts(gate_up_t2f)
        out = self._empty(parts.shape[-2], parts.shape[-1] // 2)
        rows.activate_multiply(parts, activation, out)
        return out

    def logits(self, x_th: Tensor, batch: Batch, weight: PreparedLinear, softcap: float | None = None) -> Tensor:
        assert isinstance(weight, DenseLinear)
        num_rows = batch.logit_rows.shape[0]
        x = x_th if num_rows == batch.num_tokens else x_th[batch.logit_rows]
        if self._logits is None or self._logits.shape[0] < num_rows:
            self._logits = torch.empty(num_rows, weight.out_features, dtype=torch.float32, device=self.device)
        logits = self._logits[:num_rows]
        if self._is_small(num_rows, weight):
            small.linear_logits(x, weight.weight, logits)
        else:
            torch.mm(x, weight.weight.T, out_dtype=torch.float32, out=logits)
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    def finish_loading(self, num_rows: int, num_logits: int) -> None:
        if self._uploader is not None:
            self._uploader.close()
            self._uploader = None
        self._logits = torch.empty(num_rows, num_logits, dtype=torch.float32, device=self.device)

    def sample(
        self,
        logits_rv: Tensor,
        temperature_r: Tensor,
        top_k_r: Tensor,
        top_p_r: Tensor,
        min_p_r: Tensor,
        uniform_r: Tensor,
        has_filters: bool,
    ) -> Tensor:
        return sampling.sample(logits_rv, temperature_r, top_k_r, top_p_r, min_p_r, uniform_r, has_filters=has_filters)

    def resolve_tokens(self, token_ids_t: Tensor, previous_r: Tensor) -> None:
        rows.resolve_tokens(token_ids_t, previous_r)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if source.is_cuda:
            target.copy_(source)
            return
        if self._uploader is None:
            self._uploader = Uploader(self.device)
        self._uploader.copy(source.contiguous(), target)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def _parts(x: Tensor) -> Tensor:
    return x.parts() if isinstance(x, Deferred) else x
