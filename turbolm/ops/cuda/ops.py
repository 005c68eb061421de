"""The backend for NVIDIA GPUs: which kernel runs which op.

A matrix product over few rows is not computed by `linear` itself: it hands on a `Deferred`, and the op
that takes it chooses the form that it reads at least cost (partial sums, or with the activation
applied). The partial sums of what was split over k are added up by the next kernel.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from turbolm.fallbacks import note_fallback
from turbolm.ops.cuda import eight_bit, int4
from turbolm.ops.cuda.decode import decode_attention
from turbolm.ops.cuda.decode_check import kernel_for
from turbolm.ops.cuda.eight_bit import EightBitMatrix, row_scales
from turbolm.ops.cuda.upload import Uploader
from turbolm.ops.cuda.weights import Deferred, DenseLinear, EightBitLinear, Int4Linear, PackedLinear
from turbolm.ops.triton import rows, sampling
from turbolm.ops.triton.adapters import add_adapters
from turbolm.ops.triton.adjustments import adjust
from turbolm.ops.triton.attention import attention

if TYPE_CHECKING:
    from turbolm.ops import Activation, AdapterWeights, AttentionSpec, LayerCache, PreparedLinear, RopeTable
    from turbolm.ops.adjustments import Adjustments
    from turbolm.types import Batch
    from turbolm.weights import Weight


_log = logging.getLogger(__name__)


class CudaOps:
    """`Ops` on one GPU, in bfloat16 or float16. Not thread-safe."""

    name = "cuda"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._logits: Tensor | None = None  # [rows, v], for all steps
        self._uploader: Uploader | None = None  # while weights are loaded

    def prepare_linear(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        bias = None if bias is None else bias.to(self.device, self.dtype)
        formats = {weight.format.name for weight in weights}
        if formats <= {"int4"} or formats <= {"int8"} or formats <= {"fp8"}:
            reason = _unpack_reason(weights, self.device)
            if reason is None and "int4" in formats:
                return Int4Linear(self._pack_int4(weights), bias, self._columns(weights))
            if reason is None:
                return EightBitLinear(self._stack_codes(weights), bias)
            _tell_unpacked(weights[0].format.name, reason)
        return DenseLinear(self._stack(weights), bias)

    def _stack(self, weights: list[Weight]) -> Tensor:
        """[n, k] in the dtype of activations."""
        num_rows, in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
        stacked = torch.empty(num_rows, in_features, dtype=self.dtype, device=self.device)
        row = 0
        for weight in weights:
            self._copy(weight.dequantize(self.dtype), stacked[row : row + weight.shape[0]])
            row += weight.shape[0]
        return stacked

    def _pack_int4(self, weights: list[Weight]) -> int4.Int4Matrix:
        n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        codes = torch.empty(n, k // 2, dtype=torch.uint8, device=self.device)
        for weight, part in zip(weights, torch.split(codes, [weight.shape[0] for weight in weights]), strict=True):
            self._copy(weight.tensors["codes"], part)
        scales, zeros = (
            torch.cat([weight.tensors[name].to(self.device) for weight in weights]) for name in ("scales", "zeros")
        )
        return int4.pack(codes, scales, zeros)

    def _stack_codes(self, weights: list[Weight]) -> EightBitMatrix:
        n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        codes = torch.empty(n, k, dtype=weights[0].tensors["codes"].dtype, device=self.device)
        row, scales = 0, []
        for weight in weights:
            own = row_scales(weight)
            assert own is not None
            scales.append(own.to(self.device))
            self._copy(weight.tensors["codes"], codes[row : row + weight.shape[0]])
            row += weight.shape[0]
        return EightBitMatrix(codes, torch.cat(scales))

    def _columns(self, weights: list[Weight]) -> Tensor | None:
        columns = weights[0].tensors.get("columns")
        return None if columns is None else columns.to(self.device)

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        assert isinstance(weight, PackedLinear)
        if weight.is_deferred(x_tk.shape[0]):
            return cast(Tensor, Deferred(x_tk, weight))
        return weight.multiply(x_tk)

    def add_adapters(self, y_tn: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor) -> Tensor:
        parts = _parts(y_tn)
        out = self._empty(x_tk.shape[0], adapters.ends[-1]) if parts is not y_tn else y_tn
        add_adapters(parts, x_tk, adapters, places_t, out)
        return out

    def prepare_embedding(self, weight: Weight) -> PreparedLinear:
        return DenseLinear(self._stack([weight]), None)

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
        decode = kernel_for(spec, cache, self.dtype) if batch.num_decodes else None
        if decode is not None and batch.shares_context:  # it would read what others of these rows have yet to store
            decode = functools.partial(decode_attention, overlap=False)
        attention(qkv_tw, batch, cache, spec, out, decode=decode)
        return out

    def activate_multiply(self, gate_up_t2f: Tensor, activation: Activation) -> Tensor:
        if isinstance(gate_up_t2f, Deferred) and gate_up_t2f.linear.bias is None:
            return gate_up_t2f.linear.gated(gate_up_t2f.x_tk, activation)
        parts = _parts(gate_up_t2f)
        out = self._empty(parts.shape[-2], parts.shape[-1] // 2)
        rows.activate_multiply(parts, activation, out)
        return out

    def logits(self, x_th: Tensor, batch: Batch, weight: PreparedLinear, softcap: float | None = None) -> Tensor:
        assert isinstance(weight, PackedLinear)
        num_rows = batch.logit_rows.shape[0]
        x = x_th if x_th.shape[0] == num_rows else x_th[batch.logit_rows]
        if self._logits is None or self._logits.shape[0] < num_rows:
            self._logits = torch.empty(num_rows, weight.out_features, dtype=torch.float32, device=self.device)
        logits = self._logits[:num_rows]
        weight.logits(x, logits)
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

    def adjust(self, logits_rv: Tensor, counts_sv: Tensor, adjustments: Adjustments, previous_r: Tensor) -> None:
        adjust(logits_rv, counts_sv, adjustments, previous_r)

    def resolve_tokens(self, token_ids_t: Tensor, previous_r: Tensor) -> None:
        rows.resolve_tokens(token_ids_t, previous_r)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if source.device.type == target.device.type:
            target.copy_(source)
            return
        if self._uploader is None:
            self._uploader = Uploader(self.device)
        self._uploader.copy(source.contiguous(), target)

    def upload(self, source: Tensor) -> Tensor:
        """The tensor on the device, through pinned memory."""
        target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        self._copy(source, target)
        return target

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def _parts(x: Tensor) -> Tensor:
    return x.parts() if isinstance(x, Deferred) else x


def _unpack_reason(weights: list[Weight], device: torch.device) -> str | None:
    """Why int4, int8 or fp8 matrices can't be multiplied together as they are; None: they can."""
    n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    columns = [weight.tensors.get("columns") for weight in weights]
    first = columns[0]
    if not all(own is first or (own is not None and first is not None and torch.equal(own, first)) for own in columns):
        return "matrices that share an input have their columns in different orders"
    if weights[0].format.name == "int4":
        groups = {k // weight.tensors["scales"].shape[1] for weight in weights}
        if len(groups) > 1:
            return "matrices that share an input have groups of different sizes"
        if not int4.supports(n, k, min(groups)):
            return f"no kernel takes {n} rows of {k} columns in groups of {min(groups)}"
        return None
    if first is not None or any(row_scales(weight) is None for weight in weights):
        return "kernels take one scale per row, and input columns in their order"
    if not eight_bit.supports(n, k):
        return f"no kernel takes {n} rows of {k} columns"
    is_fp8 = weights[0].format.name == "fp8"
    if is_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "the GPU has no products of 8-bit floating point (compute capability 8.9 and later have)"
    return None


def _tell_unpacked(name: str, reason: str) -> None:
    note_fallback(_log, f"{name} weights are unpacked to 16 bits: {reason}")
