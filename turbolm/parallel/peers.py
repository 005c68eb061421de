"""Memory of each GPU that the kernels of all others can read and write: PyTorch's symmetric memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """An allocation of one size on every rank."""

    local: Tensor  # uint8, this rank's, zeros at first
    addresses: Tensor  # int64 [size] on this rank's device: where each rank's begins
    handle: object = None  # keeps the others' mapped


def share(num_bytes: int, device: torch.device) -> PeerMemory | None:
    """To be called by all ranks of the default process group, with the same size. None where GPUs can't reach each
    other's memory, on every rank alike."""
    from torch.distributed import _symmetric_memory as symmetric_memory  # a tenth of a second, needed here alone

    local, addresses, handle = None, None, None
    try:
        local = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        local.zero_()
        group = dist.group.WORLD
        assert group is not None
        handle = symmetric_memory.rendezvous(local, group)
        size = dist.get_world_size()
        found = [handle.get_buffer(rank, (num_bytes,), torch.uint8).data_ptr() for rank in range(size)]
        addresses = torch.tensor(found, dtype=torch.int64, device=device)
    except RuntimeError as error:
        logger.warning("the GPUs don't share memory, sums over them go through NCCL, which is slower: %s", error)
    # The zeros are written, and everybody knows whether everybody succeeded.
    is_shared = torch.tensor([addresses is not None], dtype=torch.int32, device=device)
    dist.all_reduce(is_shared, dist.ReduceOp.MIN)
    if not bool(is_shared.item()) or local is None or addresses is None:
        return None
    return PeerMemory(local, addresses, handle)
