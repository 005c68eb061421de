"""The ops in plain torch: the oracle for every other backend, and the portable CPU backend."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from turbolm.kv import LEVELS
from turbolm.ops import Activation, AdapterWeights, AttentionSpec, LayerCache, RopeTable

if TYPE_CHECKING:
    from turbolm.kv import KvKind
    from turbolm.ops import PreparedLinear
    from turbolm.types import Batch
    from turbolm.weights import Weight

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(slots=True)
class ReferenceLinear:
    """Matrices stacked by output rows: as one dense tensor, or packed and unpacked at every use."""

    out_features: int
    in_features: int
    dense: Tensor | None  # [n, k]
    packed: tuple[Weight, ...]
    bias: Tensor | None  # [n]

    @property
    def num_bytes(self) -> int:
        dense = 0 if self.dense is None else self.dense.numel() * self.dense.element_size()
        return dense + sum(weight.num_bytes for weight in self.packed)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[n, k] in `dtype`."""
        if self.dense is not None:
            return self.dense
        parts = [weight.dequantize(dtype) for weight in self.packed]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class ReferenceOps:
    """`Ops` in plain torch on any device. `unpack` turns packed weights into dense ones once, at
    load; else they stay packed and are unpacked at every use (slow, small)."""

    name = "reference"

    def __init__(self, device: torch.device, dtype: torch.dtype, *, unpack: bool = True) -> None:
        self.device = device
        self.dtype = dtype
        self.unpack = unpack

    def prepare_linear(self, weights: list[Weight], bias: Tensor | None) -> ReferenceLinear:
        num_rows, in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
        bias = None if bias is None else bias.to(self.device, self.dtype)
        if not self.unpack and any(not w.format.is_dense for w in weights):
            packed = tuple(weights)
            return ReferenceLinear(num_rows, in_features, None, packed, bias)
        dense = torch.empty(num_rows, in_features, dtype=self.dtype, device=self.device)
        row = 0
        for weight in weights:
            dense[row : row + weight.shape[0]] = weight.dequantize(self.dtype)
            row += weight.shape[0]
        return ReferenceLinear(num_rows, in_features, dense, (), bias)

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        assert isinstance(weight, ReferenceLinear)
        return F.linear(x_tk, weight.matrix(self.dtype), weight.bias)

    def add_adapters(self, y_tn: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor) -> Tensor:
        rank = adapters.max_rank
        for place in set(places_t.tolist()):
            if place < 0 or not adapters.ranks[place]:
                continue
            rows = (places_t == place).nonzero().squeeze(1)
            shrunk = x_tk[rows] @ adapters.a[place].T  # [rows, p * r]
            for part, (first, last) in enumerate(itertools.pairwise((0, *adapters.ends))):
                own = shrunk[:, part * rank : (part + 1) * rank]
                y_tn[rows, first:last] += own @ adapters.b[place, :, first:last]
        return y_tn

    def prepare_embedding(self, weight: Weight) -> ReferenceLinear:
        return self.prepare_linear([weight], None)

    def embedding(self, token_ids_t: Tensor, table: PreparedLinear, scale: float = 1.0) -> Tensor:
        assert isinstance(table, ReferenceLinear)
        if table.dense is not None:
            rows = table.dense[token_ids_t.long()]
        else:
            weight = table.packed[0]
            rows = weight.format.select_rows(weight, token_ids_t.long()).dequantize(self.dtype)
        return rows if scale == 1.0 else rows * scale

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        x = x_th.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return (x * weight_h.float()).to(x_th.dtype)

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual_th += x_th
        return self.rms_norm(residual_th, weight_h, eps), residual_th

    def add(self, x_th: Tensor, residual_th: Tensor) -> Tensor:
        residual_th += x_th
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
        num_tokens, d = qkv_tw.shape[0], spec.head_dim
        k_end = spec.q_width + spec.num_kv_heads * d
        q = qkv_tw[:, : spec.q_width].view(num_tokens, spec.num_heads, d)
        k = qkv_tw[:, spec.q_width : k_end].view(num_tokens, spec.num_kv_heads, d)
        v = qkv_tw[:, k_end:].view(num_tokens, spec.num_kv_heads, spec.v_head_dim)
        for part, norm in ((q, q_norm), (k, k_norm)):
            if norm is not None:
                part.copy_(self.rms_norm(part, norm, eps))
            if rope is not None:
                _rotate(part, batch.positions, rope)
        slots = batch.slots.long()
        block, offset = slots // cache.block_size, slots % cache.block_size
        for heads, pool, scales, kind, fixed in (
            (k, cache.k, cache.k_scales, cache.kind_k, cache.k_range),
            (v, cache.v, cache.v_scales, cache.kind_v, cache.v_range),
        ):
            codes, scale = quantize_heads(heads, kind, fixed)
            pool[block, :, offset] = codes
            if scales is not None and scale is not None:
                scales[block, :, offset] = scale
        return qkv_tw

    def attention(self, qkv_tw: Tensor, batch: Batch, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        q = qkv_tw[:, : spec.q_width].view(-1, spec.num_heads, spec.head_dim)
        out = torch.empty(q.shape[0], spec.num_heads, spec.v_head_dim, dtype=q.dtype, device=q.device)
        if batch.max_query == 1:
            out.copy_(_attend(q.unsqueeze(1), batch.block_tables, batch.context_lens, cache, spec).squeeze(1))
        else:
            starts = batch.query_start.tolist()
            for i, (first, last) in enumerate(itertools.pairwise(starts)):
                context = batch.context_lens[i : i + 1]
                out[first:last] = _attend(q[None, first:last], batch.block_tables[i : i + 1], context, cache, spec)[0]
        return out.view(-1, spec.num_heads * spec.v_head_dim)

    def activate_multiply(self, gate_up_t2f: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up_t2f.chunk(2, dim=-1)
        return _ACTIVATIONS[activation](gate) * up

    def logits(self, x_th: Tensor, batch: Batch, weight: PreparedLinear, softcap: float | None = None) -> Tensor:
        rows = x_th if x_th.shape[0] == batch.logit_rows.shape[0] else x_th[batch.logit_rows]
        logits = self.linear(rows, weight).float()
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _rotate(x_thd: Tensor, positions_t: Tensor, rope: RopeTable) -> None:
    """Rotate the leading `rotary_dim` dimensions of each head in place."""
    index = positions_t.long()
    cos, sin = rope.cos[index].unsqueeze(1), rope.sin[index].unsqueeze(1)  # [t, 1, r/2]
    rotated = x_thd[..., : rope.rotary_dim]
    if rope.interleaved:
        first, second = rotated[..., 0::2].float(), rotated[..., 1::2].float()
    else:
        first, second = (half.float() for half in rotated.chunk(2, dim=-1))
    parts = (first * cos - second * sin, second * cos + first * sin)
    merged = torch.stack(parts, dim=-1).flatten(-2) if rope.interleaved else torch.cat(parts, dim=-1)
    rotated.copy_(merged)


def quantize_heads(x: Tensor, kind: KvKind, fixed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Heads [.., d] as `LayerCache` stores them, and their scales [.., 2]; `fixed` [heads, 2]: these."""
    if kind not in LEVELS:
        dtype = torch.float8_e4m3fn if kind == "fp8" else getattr(torch, kind)
        return (x.clamp(-448.0, 448.0) if kind == "fp8" else x).to(dtype), None
    x = x.float()
    if fixed is None:
        low, high = x.aminmax(dim=-1, keepdim=True)
        scales = torch.cat([(high - low) / LEVELS[kind], low], dim=-1).half()
    else:
        scales = fixed.expand(*x.shape[:-1], 2)
    scale, minimum = scales.float().chunk(2, dim=-1)
    codes = ((x - minimum) / scale).round().clamp(0, LEVELS[kind]).masked_fill(scale == 0, 0.0).to(torch.uint8)
    if kind == "int4":
        first, second = codes.chunk(2, dim=-1)
        codes = first | second << 4
    return codes, scales


def dequantize_heads(codes: Tensor, scales: Tensor | None, kind: KvKind) -> Tensor:
    """float32 [.., d] of what `quantize_heads` made."""
    if scales is None:
        return codes.float()
    if kind == "int4":
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    return torch.addcmul(scales[..., 1:].float(), codes.float(), scales[..., :1].float())


def _gather(pool: Tensor, scales: Tensor | None, kind: KvKind, tables_sb: Tensor, longest: int) -> Tensor:
    """float32 [s, kv, longest, d]: the sequences' keys or values, in order."""
    heads = dequantize_heads(pool[tables_sb], None if scales is None else scales[tables_sb], kind)
    return heads.transpose(1, 2).flatten(2, 3)[:, :, :longest]


def _attend(q_sqhd: Tensor, tables_sb: Tensor, contexts_s: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
    """The last q tokens of s sequences over their cached contexts → [s, q, heads, v_head_dim]."""
    num_seqs, num_queries = q_sqhd.shape[:2]
    longest = int(contexts_s.max())
    tables = tables_sb[:, : -(-longest // cache.block_size)].long()
    k = _gather(cache.k, cache.k_scales, cache.kind_k, tables, longest)
    v = _gather(cache.v, cache.v_scales, cache.kind_v, tables, longest)
    group = spec.num_heads // spec.num_kv_heads
    q = q_sqhd.view(num_seqs, num_queries, spec.num_kv_heads, group, spec.head_dim)
    scores = torch.einsum("sqkgd,skcd->skgqc", q.float(), k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key = torch.arange(longest, device=q.device)
    query = contexts_s.view(-1, 1) - num_queries + torch.arange(num_queries, device=q.device)  # positions [s, q]
    visible = key <= query.unsqueeze(-1)  # [s, q, c]
    if spec.window is not None:
        visible &= key > query.unsqueeze(-1) - spec.window
    scores.masked_fill_(~visible[:, None, None], float("-inf"))
    # K/V past a sequence's end are whatever the block held before, NaN perhaps: 0 * NaN would leak it.
    v = v.masked_fill((key >= contexts_s.view(-1, 1))[:, None, :, None], 0.0)
    out = torch.einsum("skgqc,skcd->sqkgd", torch.softmax(scores, dim=-1), v)
    return out.reshape(num_seqs, num_queries, spec.num_heads, spec.v_head_dim).to(q_sqhd.dtype)
