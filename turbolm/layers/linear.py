"""The one linear layer, and what LoRA adapters add to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from turbolm.lora import RANK_STEP
from turbolm.ops import AdapterWeights, Ops, PreparedLinear


class LowRank(NamedTuple):
    """What an adapter adds to a matrix [n, k]: scale * b @ a."""

    a_rk: Tensor
    b_nr: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a_rk.shape[0])


class Linear:
    """y = x @ W.T + b, and what the row's adapter adds; W may be several matrices stacked by output rows, in any
    formats."""

    def __init__(self, ops: Ops, weight: PreparedLinear) -> None:
        self.ops = ops
        self.weight = weight
        self._adapters: AdapterWeights | None = None

    def __call__(self, x_tk: Tensor, adapters_t: Tensor | None) -> Tensor:
        """adapters_t: place of each row's adapter, as in `Batch`."""
        y_tn = self.ops.linear(x_tk, self.weight)
        if self._adapters is None or adapters_t is None:
            return y_tn
        return self.ops.add_adapters(y_tn, x_tk, self._adapters, adapters_t)

    def reserve(self, num_places: int, max_rank: int, sizes: Sequence[int]) -> None:
        """Make room for so many adapters. `sizes`: rows of each of the stacked matrices."""
        rank = -(-max_rank // RANK_STEP) * RANK_STEP
        ends = tuple(itertools.accumulate(sizes))
        assert ends[-1] == self.weight.out_features

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_places, *shape, dtype=self.ops.dtype, device=self.ops.device)

        ranks = torch.zeros(num_places, dtype=torch.int32, device=self.ops.device)
        a = zeros(len(sizes) * rank, self.weight.in_features)
        self._adapters = AdapterWeights(a, zeros(rank, ends[-1]), ranks, ends)

    def put(self, place: int, parts: Sequence[LowRank | None]) -> None:
        """The adapter in `place` adds this to each of the stacked matrices from now on. Steps in flight are those of
        the adapter that was there."""
        weights = self._adapters
        assert weights is not None, "there is room for adapters"
        a, b, rank = weights.a[place], weights.b[place], weights.max_rank
        for tensor in (a, b):
            tensor.zero_()
        for part, (own, first, last) in enumerate(zip(parts, (0, *weights.ends), weights.ends, strict=False)):
            if own is not None:
                a[part * rank : part * rank + own.rank] = own.a_rk.to(a)
                b[: own.rank, first:last] = (own.b_nr.float() * own.scale).T.to(b)
        weights.ranks[place] = max((own.rank for own in parts if own is not None), default=0)
