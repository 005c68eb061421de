"""One rank's part of a decoder: a smaller spec of the same kind, and what to cut out of each matrix.

Attention is divided by heads, the feed-forward by width, embedding and head by tokens. What is divided along
its input columns (output projection, down) gives each rank one summand of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turbolm.errors import CheckpointError, ConfigError
from turbolm.layers.linear import LowRank
from turbolm.models.loader import Loader, Progress
from turbolm.models.spec import DecoderSpec, LayerSpec
from turbolm.ops import AttentionSpec, PreparedLinear
from turbolm.ops.sharded import ShardedOps
from turbolm.parallel.shard import Shard
from turbolm.quant.dense import dense
from turbolm.quant.rounding import Rounding
from turbolm.weights import Packing, Weight, WeightSource


@dataclass(frozen=True, slots=True)
class Slice:
    """The index-th of `count` equal parts along output rows (0) or input columns (1)."""

    dim: int
    index: int
    count: int

    def weights(self, weight: Weight) -> list[Weight]:
        return [weight.format.shard(weight, self.dim, self.index, self.count)]

    def bias(self, bias_n: Tensor) -> Tensor | None:
        """None: another rank adds it."""
        if self.dim == 0:
            return bias_n.chunk(self.count)[self.index]
        return bias_n if self.index == 0 else None

    def low_rank(self, added: LowRank) -> LowRank:
        """What an adapter adds to this part. Along input columns it is a summand too: b @ (part of a) @ (part of x)."""
        if self.dim == 0:
            return added._replace(b_nr=added.b_nr.chunk(self.count)[self.index])
        return added._replace(a_rk=added.a_rk.chunk(self.count, 1)[self.index])


@dataclass(frozen=True, slots=True)
class Rows:
    """Output rows in this order, then `num_zero` rows of zeros."""

    rows: tuple[int, ...] | range
    num_zero: int = 0

    def weights(self, weight: Weight) -> list[Weight]:
        device = next(iter(weight.tensors.values())).device
        index = torch.tensor(self.rows, dtype=torch.int64, device=device)
        found = [weight.format.select_rows(weight, index)] if self.rows else []
        if self.num_zero:
            found.append(dense(torch.zeros(self.num_zero, weight.shape[1], dtype=torch.bfloat16, device=device)))
        return found

    def bias(self, bias_n: Tensor) -> Tensor | None:
        chosen = bias_n[torch.tensor(self.rows, dtype=torch.int64, device=bias_n.device)]
        return torch.cat([chosen, bias_n.new_zeros(self.num_zero)])

    def low_rank(self, added: LowRank) -> LowRank:
        """As of a `Slice`."""
        return added._replace(b_nr=added.b_nr[torch.tensor(self.rows, dtype=torch.int64)])


Cut = Slice | Rows


def shard_spec(spec: DecoderSpec, shard: Shard) -> DecoderSpec:
    """What the rank computes. Raises ConfigError where a layer can't be divided so."""
    if shard.size == 1:
        return spec
    layers = tuple(_shard_layer(layer, shard) for layer in spec.layers)
    return replace(spec, layers=layers, vocab_size=shard.vocabulary_size(spec.vocab_size))


def cuts(spec: DecoderSpec, shard: Shard) -> Mapping[str, Cut]:
    """What the rank takes of each matrix, by module name; `spec` is the whole model's."""
    if shard.size == 1:
        return {}
    tokens = shard.vocabulary(spec.vocab_size)
    rows = Rows(tokens, shard.vocabulary_size(spec.vocab_size) - len(tokens))
    found: dict[str, Cut] = {spec.embedding: rows}
    if spec.head is not None:
        found[spec.head] = rows
    output = Slice(0, shard.rank, shard.size)
    columns = Slice(1, shard.rank, shard.size)
    for layer in spec.layers:
        names, mlp = layer.attention_names, layer.mlp
        if len(names.qkv) == 1:
            found[names.qkv[0]] = Rows(_packed_rows(layer, shard))
        else:
            kv = Slice(0, *shard.copy_of(layer.attention.num_kv_heads))
            found |= dict(zip(names.qkv, (output, kv, kv), strict=True))
        found |= {names.output: columns, mlp.gate: output, mlp.up: output, mlp.down: columns}
    return found


def _shard_layer(layer: LayerSpec, shard: Shard) -> LayerSpec:
    attention, size = layer.attention, shard.size
    for what, count in (("attention heads", attention.num_heads), ("columns of the feed-forward", layer.mlp.width)):
        if count % size:
            raise ConfigError(
                f"tensor_parallel is {size}, which doesn't divide the model's {count} {what}; "
                f"choose one of {', '.join(map(str, _divisors(layer)))}"
            )
    num_kv_heads = attention.num_kv_heads
    if max(num_kv_heads, size) % min(num_kv_heads, size):
        raise ConfigError(
            f"tensor_parallel is {size}, and the model has {num_kv_heads} kv heads: neither divides the other; "
            f"choose one of {', '.join(map(str, _divisors(layer)))}"
        )
    return replace(
        layer,
        attention=_shard_attention(attention, shard),
        attention_names=replace(layer.attention_names, qkv_rows=None),
        mlp=replace(layer.mlp, width=layer.mlp.width // size),
    )


def _shard_attention(spec: AttentionSpec, shard: Shard) -> AttentionSpec:
    count = shard.copy_of(spec.num_kv_heads)[1]
    return replace(spec, num_heads=spec.num_heads // shard.size, num_kv_heads=spec.num_kv_heads // count)


def _divisors(layer: LayerSpec) -> list[int]:
    """Numbers of ranks that a layer can be divided over."""
    heads, kv_heads, width = layer.attention.num_heads, layer.attention.num_kv_heads, layer.mlp.width
    return [
        size
        for size in range(1, heads + 1)
        if heads % size == 0 and width % size == 0 and max(kv_heads, size) % min(kv_heads, size) == 0
    ]


def _packed_rows(layer: LayerSpec, shard: Shard) -> tuple[int, ...]:
    """This rank's rows of a matrix that packs q, k and v: all q, all k, all v."""
    spec = layer.attention
    kv_index, kv_count = shard.copy_of(spec.num_kv_heads)
    parts, start = [], 0
    for width, index, count in (
        (spec.q_width, shard.rank, shard.size),
        (spec.num_kv_heads * spec.head_dim, kv_index, kv_count),
        (spec.num_kv_heads * spec.v_head_dim, kv_index, kv_count),
    ):
        part = width // count
        parts.append(range(start + index * part, start + (index + 1) * part))
        start += width
    order = layer.attention_names.qkv_rows
    return tuple(row if order is None else order[row] for row in itertools.chain(*parts))


class ShardLoader(Loader):
    """Reads one rank's part of a checkpoint. Shapes are those of the rank's `shard_spec`."""

    def __init__(
        self,
        source: WeightSource,
        ops: ShardedOps,
        cuts: Mapping[str, Cut],
        progress: Progress | None = None,
        *,
        packing: Packing | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__(source, ops, progress, packing=packing, rounding=rounding)
        self._sharded_ops = ops
        self._cuts = cuts

    def linear(
        self, prefixes: Sequence[str], shape: tuple[int, int], has_bias: bool, rows: Sequence[int] | None = None
    ) -> PreparedLinear:
        assert rows is None, "their order is part of the cut"
        weights = [part for prefix in prefixes for part in self._part(prefix, shape[1])]
        self._check_rows(prefixes, weights, shape[0])
        biases = [self._bias(prefix) for prefix in prefixes] if has_bias else []
        bias = torch.cat([part for part in biases if part is not None]) if any(b is not None for b in biases) else None
        is_partial = any(isinstance(cut, Slice) and cut.dim == 1 for cut in map(self._cuts.__getitem__, prefixes))
        if not has_bias:
            self._check_no_bias(prefixes)
        prepare = self._sharded_ops.prepare_partial if is_partial else self._sharded_ops.prepare_linear
        prepared = prepare(weights, bias)
        self._release(*prefixes)
        return prepared

    def embedding(self, prefix: str, shape: tuple[int, int]) -> PreparedLinear:
        weights = self._part(prefix, shape[1])
        self._check_rows([prefix], weights, shape[0])
        prepared = self._sharded_ops.prepare_table(weights)
        self._release(prefix)
        return prepared

    def _part(self, prefix: str, in_features: int) -> list[Weight]:
        cut = self._cuts[prefix]
        count = cut.count if isinstance(cut, Slice) and cut.dim == 1 else 1
        weight = self._weight(prefix, in_features * count)
        if isinstance(cut, Rows) and max(cut.rows, default=0) >= weight.shape[0]:
            raise CheckpointError(
                f"{prefix}: {weight.shape[0]} output rows in the checkpoint, the config implies {max(cut.rows) + 1}"
            )
        return cut.weights(weight)

    def _bias(self, prefix: str) -> Tensor | None:
        return self._cuts[prefix].bias(self.vector(f"{prefix}.bias"))

    def _check_rows(self, prefixes: Sequence[str], weights: Sequence[Weight], expected: int) -> None:
        num_rows = sum(weight.shape[0] for weight in weights)
        if num_rows != expected:
            raise CheckpointError(
                f"{' + '.join(prefixes)}: {num_rows} output rows in a rank's part of the checkpoint, "
                f"the config implies {expected}"
            )
