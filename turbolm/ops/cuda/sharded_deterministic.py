"""One rank's part of a model on its GPU, where an answer's bits don't depend on what else is computed.

Products, attention and norms are those of `deterministic.py`. A sum over ranks is made by row, in the order of ranks,
whatever the number of rows: by the kernel for small steps, slice by slice, or, where GPUs can't reach each other's
memory, of all summands gathered (NCCL's own sums divide rows by how many there are).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.ops.cuda.deterministic import DeterministicCudaOps
from turbolm.ops.cuda.sharded import ShardedCudaOps
from turbolm.ops.sharded import Summand
from turbolm.ops.triton import peers


class ShardedDeterministicOps(ShardedCudaOps, DeterministicCudaOps):
    """`ShardedOps` in bfloat16 or float16. Not thread-safe."""

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inbox = self._inbox
        if not isinstance(x_th, Summand) or inbox is None:
            return super().add_rms_norm(x_th, residual_th, weight_h, eps)
        out = torch.empty_like(residual_th)
        for first in range(0, out.shape[0], inbox.max_rows):
            part = slice(first, first + inbox.max_rows)
            peers.reduce_add_rms_norm(x_th.value[part], residual_th[part], weight_h, eps, out[part], inbox)
        return out, residual_th

    def _summed(self, x_th: Tensor) -> Tensor:
        if not isinstance(x_th, Summand):
            return x_th
        first, *others = self._collectives.all_gather(x_th.value).unbind(0)
        total = first.float()
        for other in others:
            total += other
        return total.to(self.dtype)
