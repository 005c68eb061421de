"""Sums and gathers over all ranks, through torch.distributed: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.parallel.peers import PeerMemory, share
from turbolm.parallel.processes import STUCK_SECONDS
from turbolm.parallel.shard import Shard

_NCCL_SECONDS = 600.0


class ProcessGroup:
    """All ranks. Every rank calls the same functions in the same order; on GPUs they return at once."""

    def __init__(self, shard: Shard, device: torch.device, store_path: Path) -> None:
        """Waits for all ranks. `store_path`: a file in a private folder, the same for all; it need not exist."""
        if dist.is_initialized():
            raise EngineError(
                "torch.distributed is in use in this process already, and tensor_parallel needs it: load the model in "
                "a process of its own"
            )
        self.rank, self.size = shard.rank, shard.size
        self._device = device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(str(store_path), shard.size),  # type: ignore[attr-defined]
            rank=shard.rank,
            world_size=shard.size,
            # On GPUs whoever waits for a step notices first; past this time NCCL ends the process.
            timeout=datetime.timedelta(seconds=_NCCL_SECONDS if on_gpu else STUCK_SECONDS),
            device_id=device if on_gpu else None,
        )

    def all_reduce(self, x: Tensor) -> None:
        """The sum over all ranks, in place: the same bits everywhere."""
        dist.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's x, of one shape."""
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous())
        return gathered

    def share(self, num_bytes: int) -> PeerMemory | None:
        """Memory of this GPU's that all the others can use, and theirs; None where GPUs can't do so."""
        return share(num_bytes, self._device)

    def abort(self) -> None:
        """Leave the group without waiting for others, who may be gone. Idempotent."""
        if not dist.is_initialized():
            return
        if self._device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
