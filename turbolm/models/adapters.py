"""Where a decoder's adapters lie: the merged matrices that they add to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from turbolm.layers.linear import Linear, LowRank
from turbolm.models.decoder import Decoder
from turbolm.models.peft import Adapter, module_shapes
from turbolm.models.sharding import Cut
from turbolm.models.spec import DecoderSpec


class _Adapted(NamedTuple):
    """A merged matrix and the names of those that it is made of."""

    linear: Linear
    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None  # the order of a packed one's rows


class AdaptedDecoder:
    """A decoder with room for adapters. For the thread that runs its steps."""

    def __init__(
        self,
        model: Decoder,
        num_places: int,
        max_rank: int,
        whole: DecoderSpec | None = None,
        cuts: Mapping[str, Cut] | None = None,
    ) -> None:
        """`whole`, `cuts`: of the model that this one is a rank's part of, if it is one."""
        self.num_places = num_places
        self.max_rank = max_rank
        self.spec = whole or model.spec
        self._cuts = cuts or {}
        self._linears = list(_linears(model))
        shapes = module_shapes(model.spec)
        for linear, names, _ in self._linears:
            linear.reserve(num_places, max_rank, [shapes[name][0] for name in names])

    @torch.inference_mode()
    def put(self, place: int, adapter: Adapter) -> None:
        """Rows of this place get what the adapter adds. `adapter`: for the whole model."""
        for linear, names, rows in self._linears:
            parts = [self._own(name, adapter.modules.get(name)) for name in names]
            linear.put(place, [_ordered(part, rows) for part in parts])

    def _own(self, name: str, part: LowRank | None) -> LowRank | None:
        cut = self._cuts.get(name)
        return part if part is None or cut is None else cut.low_rank(part)


def _linears(model: Decoder) -> Iterator[_Adapted]:
    for spec, layer in zip(model.spec.layers, model.layers, strict=True):
        names = spec.attention_names
        yield _Adapted(layer.attention.qkv, names.qkv, names.qkv_rows)
        yield _Adapted(layer.attention.output, (names.output,))
        yield _Adapted(layer.mlp.gate_up, (spec.mlp.gate, spec.mlp.up))
        yield _Adapted(layer.mlp.down, (spec.mlp.down,))


def _ordered(part: LowRank | None, rows: tuple[int, ...] | None) -> LowRank | None:
    if part is None or rows is None:
        return part
    return part._replace(b_nr=part.b_nr[torch.tensor(rows)])
