"""One rank's part of a model that several processes compute together: the ops that differ then.

Each rank holds some heads, some columns of the feed-forward, and some tokens of the vocabulary. Sums of all
ranks' products are made as they are consumed; logits stay apart until a token is chosen. All ranks run the
same steps in the same order, and end up with the same tokens.

r  rows    v  tokens of one rank's part of the vocabulary    h  hidden size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from turbolm.ops import DeviceOps, PreparedLinear
from turbolm.ops.adjustments import Adjustments, adjust
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.sampling import sample

if TYPE_CHECKING:
    from turbolm.ops import AdapterWeights
    from turbolm.weights import Weight


class Collectives(Protocol):
    """What ranks do together. Every rank calls the same functions in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> None:
        """The sum over all ranks, in place: the same bits everywhere."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's x, of one shape."""


class ShardedOps(DeviceOps, Protocol):
    """A backend of one rank. Its `logits` are those of the rank's part of the vocabulary, and `adjust` changes and
    counts these alone; `add_adapters` adds what the rank has of an adapter's matrices, cut as the matrix is."""

    def prepare_partial(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        """As `prepare_linear`, of this rank's input columns: `linear` gives the sum over all ranks. One of
        them has the bias."""

    def prepare_table(self, weights: list[Weight]) -> PreparedLinear:
        """As `prepare_embedding`, of this rank's rows; `embedding` takes ids of the whole vocabulary."""

    def gather_logits(self, logits_rv: Tensor) -> Tensor:
        """[r, whole vocabulary]. `sample` takes a rank's own part and needs none of this."""


@dataclass(frozen=True, slots=True)
class PartialLinear:
    """A matrix's columns whose product is one of the ranks' summands."""

    inner: PreparedLinear

    @property
    def out_features(self) -> int:
        return self.inner.out_features

    @property
    def in_features(self) -> int:
        return self.inner.in_features

    @property
    def num_bytes(self) -> int:
        return self.inner.num_bytes


@dataclass(slots=True)
class Summand:
    """A product that has to be summed over all ranks: its consumer does so, when what adapters add is in it."""

    value: Tensor


def join_parts(parts_srv: Tensor) -> Tensor:
    """[size, r, v] → [r, size * v]: each row's parts in the order of ranks."""
    return parts_srv.transpose(0, 1).flatten(1)


class ShardedReferenceOps(ReferenceOps):
    """`ShardedOps` in plain torch on any device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, collectives: Collectives, vocab_size: int) -> None:
        """`vocab_size`: tokens that may be chosen, of the whole vocabulary."""
        super().__init__(device, dtype)
        self._collectives = collectives
        self._vocab_size = vocab_size

    def prepare_partial(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        return PartialLinear(self.prepare_linear(weights, bias))

    def prepare_table(self, weights: list[Weight]) -> PreparedLinear:
        return self.prepare_linear(weights, None)

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        if not isinstance(weight, PartialLinear):
            return super().linear(x_tk, weight)
        return cast(Tensor, Summand(super().linear(x_tk, weight.inner)))

    def add_adapters(self, y_tn: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor) -> Tensor:
        if isinstance(y_tn, Summand):
            return cast(Tensor, Summand(super().add_adapters(y_tn.value, x_tk, adapters, places_t)))
        return super().add_adapters(y_tn, x_tk, adapters, places_t)

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        return super().rms_norm(self._summed(x_th), weight_h, eps)

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return super().add_rms_norm(self._summed(x_th), residual_th, weight_h, eps)

    def add(self, x_th: Tensor, residual_th: Tensor) -> Tensor:
        return super().add(self._summed(x_th), residual_th)

    def _summed(self, x_th: Tensor) -> Tensor:
        if not isinstance(x_th, Summand):
            return x_th
        self._collectives.all_reduce(x_th.value)
        return x_th.value

    def embedding(self, token_ids_t: Tensor, table: PreparedLinear, scale: float = 1.0) -> Tensor:
        ids = token_ids_t - self._collectives.rank * table.out_features
        is_own = (ids >= 0) & (ids < table.out_features)
        rows = super().embedding(torch.where(is_own, ids, 0), table, scale) * is_own.unsqueeze(1)
        self._collectives.all_reduce(rows)
        return rows

    def finish_loading(self, num_rows: int, num_logits: int) -> None:
        """Nothing is prepared for."""

    def gather_logits(self, logits_rv: Tensor) -> Tensor:
        return join_parts(self._collectives.all_gather(logits_rv))

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
        del has_filters
        logits = self.gather_logits(logits_rv)[:, : self._vocab_size]
        return sample(logits, temperature_r, top_k_r.long(), top_p_r, min_p_r, uniform_r).int()

    def adjust(self, logits_rv: Tensor, counts_sv: Tensor, adjustments: Adjustments, previous_r: Tensor) -> None:
        adjust(logits_rv, counts_sv, adjustments, previous_r, self._collectives.rank * logits_rv.shape[1])

    def resolve_tokens(self, token_ids_t: Tensor, previous_r: Tensor) -> None:
        sampled = previous_r[(-1 - token_ids_t).clamp(min=0)].clamp(min=0)
        token_ids_t.copy_(torch.where(token_ids_t < 0, sampled, token_ids_t))
