"""One rank's part of a model on its GPU.

Sums over ranks, and the residual and norm that follow, are one kernel for steps of up to `_MAX_SENT` rows in all;
larger ones go through NCCL. Where GPUs can't reach each other's memory, all do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from turbolm.ops.cuda.ops import CudaOps
from turbolm.ops.cuda.weights import Deferred, DenseLinear
from turbolm.ops.sharded import Collectives, PartialLinear, Summand, join_parts
from turbolm.ops.triton import peers, sharded_sampling
from turbolm.ops.triton.adjustments import adjust
from turbolm.ops.triton.filters import GROUP
from turbolm.ops.triton.sharded_sampling import SharedLogits

if TYPE_CHECKING:
    from turbolm.ops import AdapterWeights, PreparedLinear
    from turbolm.ops.adjustments import Adjustments
    from turbolm.weights import Weight

_MAX_SENT = 4096  # rows that arrive in one sum from all ranks together


class GpuCollectives(Collectives, Protocol):
    def share(self, num_bytes: int) -> peers.PeerMemory | None:
        """Memory of all ranks, of the same size, zeros; None where GPUs can't reach each other's. Comes back when all
        ranks have called it, and have written what they were to write before that."""


class ShardedCudaOps(CudaOps):
    """`ShardedOps` in bfloat16 or float16. Not thread-safe."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, collectives: GpuCollectives, vocab_size: int, hidden_size: int
    ) -> None:
        """`vocab_size`: tokens that may be chosen, of the whole vocabulary."""
        super().__init__(device, dtype)
        self._collectives = collectives
        self._vocab_size = vocab_size
        self._hidden_size = hidden_size
        self._inbox: peers.Inbox | None = None
        self._table: DenseLinear | None = None
        self._tables: peers.PeerMemory | None = None  # each rank's table
        self._shared_logits: SharedLogits | None = None

    def prepare_partial(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        return PartialLinear(self.prepare_linear(weights, bias))

    def prepare_table(self, weights: list[Weight]) -> PreparedLinear:
        self._table = DenseLinear(self._stack(weights), None)
        return self._table

    def finish_loading(self, num_rows: int, num_logits: int) -> None:
        """Waits for the other ranks."""
        super().finish_loading(num_rows, num_logits)
        if self._table is not None and not self._share_table():
            return
        size, rank = self._collectives.size, self._collectives.rank
        max_rows = _MAX_SENT // size
        # When this has come back, all ranks' tables are written.
        memory = self._collectives.share(peers.Inbox.num_bytes(size, max_rows, self._hidden_size, self.dtype))
        if memory is None:
            assert self._tables is None, "the tables could be shared"
            return
        counts = torch.zeros(max_rows, dtype=torch.int64, device=self.device)
        self._inbox = peers.Inbox(memory, counts, rank, size, max_rows, self._hidden_size, self.dtype)
        if num_logits % int(GROUP.value) == 0:
            self._share_logits(num_rows, num_logits)

    def _share_table(self) -> bool:
        """This rank's table to where the others can read it, once they know that it is written; False: they can't."""
        assert self._table is not None
        own = self._table.weight
        self._tables = self._collectives.share(own.numel() * own.element_size())
        if self._tables is not None:
            self._table.weight = self._tables.local.view(self.dtype).view(own.shape).copy_(own)
        return self._tables is not None

    def _share_logits(self, num_rows: int, width: int) -> None:
        """`width`: of this rank's part."""
        size, rank = self._collectives.size, self._collectives.rank
        logits = self._collectives.share(num_rows * width * 4)
        inbox = self._collectives.share(SharedLogits.inbox_bytes(size, num_rows, width))
        assert logits is not None and inbox is not None, "the other inbox could be shared"
        self._logits = logits.local.view(torch.float32).view(num_rows, width)
        counts = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self._shared_logits = SharedLogits(logits, inbox, counts, rank, size, num_rows, width, self._vocab_size)

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        if isinstance(weight, PartialLinear):
            return cast(Tensor, Summand(super().linear(x_tk, weight.inner)))
        return super().linear(x_tk, weight)

    def add_adapters(self, y_tn: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor) -> Tensor:
        if isinstance(y_tn, Summand):
            return cast(Tensor, Summand(super().add_adapters(y_tn.value, x_tk, adapters, places_t)))
        return super().add_adapters(y_tn, x_tk, adapters, places_t)

    def adjust(self, logits_rv: Tensor, counts_sv: Tensor, adjustments: Adjustments, previous_r: Tensor) -> None:
        adjust(logits_rv, counts_sv, adjustments, previous_r, self._collectives.rank * logits_rv.shape[1])

    def embedding(self, token_ids_t: Tensor, table: PreparedLinear, scale: float = 1.0) -> Tensor:
        num_rows = table.out_features
        if self._tables is not None:
            out = self._empty(token_ids_t.shape[0], table.in_features)
            peers.embedding(token_ids_t, self._tables.addresses, num_rows, scale, out)
            return out
        ids = token_ids_t - self._collectives.rank * num_rows
        is_own = (ids >= 0) & (ids < num_rows)
        found = super().embedding(torch.where(is_own, ids, 0), table, scale) * is_own.unsqueeze(1)
        self._collectives.all_reduce(found)
        return found

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        return super().rms_norm(self._summed(x_th), weight_h, eps)

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inbox = self._inbox
        if isinstance(x_th, Summand) and inbox is not None and residual_th.shape[0] <= inbox.max_rows:
            out = torch.empty_like(residual_th)
            peers.reduce_add_rms_norm(_parts(x_th), residual_th, weight_h, eps, out, inbox)
            return out, residual_th
        return super().add_rms_norm(self._summed(x_th), residual_th, weight_h, eps)

    def add(self, x_th: Tensor, residual_th: Tensor) -> Tensor:
        return super().add(self._summed(x_th), residual_th)

    def _summed(self, x_th: Tensor) -> Tensor:
        """Of a summand the sum, through NCCL."""
        if not isinstance(x_th, Summand):
            return x_th
        parts = _parts(x_th)
        summed = parts.sum(0).to(self.dtype) if parts.dim() == 3 else parts
        self._collectives.all_reduce(summed)
        return summed

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
        shared = self._shared_logits
        if shared is not None and not has_filters:
            assert logits_rv.data_ptr() == shared.logits.local.data_ptr(), "the rows lie where all ranks see them"
            return sharded_sampling.sample(logits_rv.shape[0], temperature_r, uniform_r, shared)
        logits = self.gather_logits(logits_rv)[:, : self._vocab_size]
        return super().sample(logits, temperature_r, top_k_r, top_p_r, min_p_r, uniform_r, has_filters)


def _parts(x_th: Summand) -> Tensor:
    value: Tensor | Deferred = x_th.value
    return value.parts() if isinstance(value, Deferred) else value
