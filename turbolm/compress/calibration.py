"""Runs the calibration samples through a model, one layer at a time.

The hidden states of all samples lie in files that are mapped: a layer reads one and writes the other. In
memory are one layer and one batch.

t  tokens      h  hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from turbolm.compress.layer import LayerTensors, OverlaySource
from turbolm.compress.samples import Samples
from turbolm.compress.statistics import Statistics
from turbolm.config import EngineConfig, choose_backend
from turbolm.errors import ConfigError
from turbolm.layers.rope import RopeSpec
from turbolm.models.decoder import DecoderLayer, load_layer
from turbolm.models.loader import Loader
from turbolm.models.spec import DecoderSpec
from turbolm.ops import AttentionSpec, LayerCache, PreparedLinear, RopeTable
from turbolm.ops.hardware import probe
from turbolm.ops.reference import ReferenceOps
from turbolm.quant import load_weight
from turbolm.types import Batch
from turbolm.weights import Packing, WeightSource

_BATCH_TOKENS = 4096  # computed at once


def calibration_device(name: str) -> tuple[torch.device, torch.dtype]:
    """Where layers are computed ("auto", "cpu" or "cuda"), and in what. Raises ConfigError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; allowed: auto, cpu, cuda")
    device = choose_backend(EngineConfig.of(device=name), probe()).device
    return torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16


class RecordingOps(ReferenceOps):
    """`ReferenceOps` that shows the inputs of linear layers to `observe`, and keys and values [t, heads, d] as they
    are stored to `observe_kv`."""

    observe: Callable[[PreparedLinear, Tensor], None] | None = None
    observe_kv: Callable[[Tensor, Tensor], None] | None = None

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        if self.observe is not None:
            self.observe(weight, x_tk)
        return super().linear(x_tk, weight)

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
        qkv_tw = super().rotary_store(qkv_tw, batch, cache, spec, rope, q_norm, k_norm, eps)
        if self.observe_kv is not None:
            widths = [spec.q_width, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.v_head_dim]
            _, k, v = torch.split(qkv_tw, widths, dim=1)
            heads = (-1, spec.num_kv_heads)
            self.observe_kv(k.view(*heads, spec.head_dim), v.view(*heads, spec.v_head_dim))
        return qkv_tw


class Calibration:
    """The samples on their way through the layers."""

    def __init__(
        self, spec: DecoderSpec, source: WeightSource, samples: Samples, ops: RecordingOps, folder: Path
    ) -> None:
        """`folder` holds the hidden states: [t, h] in `ops.dtype`, before even and odd layers."""
        self._spec = spec
        self._source = source
        self._ops = ops
        self._num_tokens = samples.num_tokens
        self._ropes: dict[RopeSpec, RopeTable] = {}
        self._batches = [lay_out(group, ops.device) for group in _groups(samples)]
        self._max_context = max(batch.max_context for batch in self._batches)
        shape = (self._num_tokens, spec.hidden_size)
        self._hidden = [
            torch.from_file(
                str(folder / f"hidden-{name}.bin"), shared=True, size=shape[0] * shape[1], dtype=ops.dtype
            ).view(shape)
            for name in ("even", "odd")
        ]

    def embed(self, packing: Packing | None = None) -> None:
        """The input of the first layer. `packing`: the checkpoint's."""
        ops, name = self._ops, self._spec.embedding
        table = ops.prepare_embedding(load_weight(self._source, name, packing))
        for batch, rows in self._rows():
            self._hidden[0][rows] = ops.embedding(batch.token_ids, table, self._spec.embedding_scale).cpu()
        self._source.release(f"{name}.weight")

    def observe(self, index: int, layer: LayerTensors) -> dict[str, Statistics]:
        """What the layer's linear layers are given, by the names of its points."""
        built = self._build(layer)
        found = {
            point.name: Statistics.empty(layer.matrices[point.modules[0]].shape[1], self._num_tokens, self._ops.device)
            for point in layer.points
        }
        targets = {id(point.prepared(built)): found[point.name] for point in layer.points}
        self._ops.observe = lambda weight, x_tk: targets[id(weight)].add(x_tk)
        try:
            for batch, rows in self._rows():
                self._forward(built, index, batch, rows)
        finally:
            self._ops.observe = None
        for statistics in found.values():
            statistics.finish()
        return found

    def advance(self, index: int, layer: LayerTensors) -> None:
        """Compute the next layer's input."""
        built = self._build(layer)
        for batch, rows in self._rows():
            self._hidden[(index + 1) % 2][rows] = self._forward(built, index, batch, rows).cpu()

    def _build(self, layer: LayerTensors) -> DecoderLayer:
        own = {f"{module}.weight": matrix for module, matrix in layer.matrices.items()} | layer.vectors
        loader = Loader(OverlaySource(self._source, own), self._ops)
        return load_layer(layer.spec, self._spec, loader, self._ropes, self._max_context)

    def _forward(self, layer: DecoderLayer, index: int, batch: Batch, rows: slice) -> Tensor:
        ops, eps = self._ops, self._spec.norm_eps
        cache = self._cache(layer.attention.spec, batch)
        residual = self._hidden[index % 2][rows].to(ops.device, copy=True)
        x = layer.attention(ops.rms_norm(residual, layer.attention_norm, eps), batch, cache)
        x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
        return ops.add(layer.mlp(x, batch.adapters), residual)

    def _cache(self, spec: AttentionSpec, batch: Batch) -> LayerCache:
        """Room for the batch's keys and values: a block for each sequence."""
        rows = (batch.num_sequences, spec.num_kv_heads, batch.max_context)
        k, v = (
            torch.zeros(*rows, dim, dtype=self._ops.dtype, device=self._ops.device)
            for dim in (spec.head_dim, spec.v_head_dim)
        )
        return LayerCache(k, v)

    def _rows(self) -> Iterator[tuple[Batch, slice]]:
        """Each batch and its rows of the hidden states."""
        start = 0
        for batch in self._batches:
            yield batch, slice(start, start + batch.num_tokens)
            start += batch.num_tokens


def _groups(samples: Samples) -> Iterator[list[tuple[int, ...]]]:
    """Samples that are computed at once."""
    group: list[tuple[int, ...]] = []
    for sample in samples.token_ids:
        if group and sum(map(len, group)) + len(sample) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(sample)
    yield group


def lay_out(sequences: list[tuple[int, ...]], device: torch.device) -> Batch:
    """Whole sequences as one prefill, each with a KV block of its own as long as the longest."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    positions = torch.cat([torch.arange(len(sequence), dtype=torch.int32) for sequence in sequences])
    blocks = torch.arange(len(sequences), dtype=torch.int32)
    longest, num_tokens = int(lengths.max()), int(starts[-1])
    return Batch(
        token_ids=torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32).to(device),
        positions=positions.to(device),
        slots=(blocks.repeat_interleave(lengths) * longest + positions).to(device),
        query_start=starts.to(device),
        context_lens=lengths.to(device),
        block_tables=blocks[:, None].to(device),
        logit_rows=torch.arange(num_tokens, dtype=torch.int32).to(device),
        num_tokens=num_tokens,
        num_sequences=len(sequences),
        max_query=longest,
        max_context=longest,
        chunks=tuple((int(first), int(n), int(n)) for first, n in zip(starts[:-1], lengths, strict=True)),
    )
