"""Ranks as processes that share memory, in which Triton's interpreter runs kernels that wait for each other."""

from __future__ import annotations

import mmap
import os
import traceback
from collections.abc import Callable

import torch
from torch import Tensor


class Memory:
    """`PeerMemory` of one rank."""

    def __init__(self, parts: list[Tensor], rank: int) -> None:
        self.local, self.addresses = parts[rank], torch.tensor([part.data_ptr() for part in parts])


def shared_bytes(num_bytes: int) -> Tensor:
    """Zeros that processes forked later share."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def on_all_ranks(size: int, work: Callable[[int], None]) -> None:
    """`work(rank)` in a process each."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # a forked process has none of the others
                work(rank)
                code = 0
            except BaseException:  # noqa: BLE001 (this process is about to end)
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * size
