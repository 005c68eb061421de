"""Ranks as threads of one process, for tests of what they compute together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Meeting:
    """Where threads leave a value each, and all get all of them."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadGroup:
    """`ops.sharded.Collectives` of one thread."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, len(meeting.values)

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(sum(self.meeting.exchange(self.rank, x.clone())))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x.clone()))


def on_all_ranks(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `work` gives on each rank."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadGroup(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [job.result() for job in jobs]
