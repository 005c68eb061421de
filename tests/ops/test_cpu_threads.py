"""The team of threads behind the native kernels: forks, several teams, idleness, crowding."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from turbolm.errors import ConfigError
from turbolm.ops.cpu.ops import CpuOps


def product(ops: CpuOps, rows: int = 64) -> torch.Tensor:
    """Something that all threads work on, with a known result."""
    x = torch.arange(rows * 256, dtype=torch.float32).view(rows, 256)
    return ops.add(x, torch.ones(rows, 256))


def is_right(result: torch.Tensor) -> bool:
    return torch.equal(result, torch.arange(result.numel(), dtype=torch.float32).view_as(result) + 1)


def num_threads_of_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("threads", [1, 2, 7, 20])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than cores are no problem: a waiting thread leaves its core to the others."""
    ops = CpuOps(threads=threads)
    start = time.monotonic()
    assert all(is_right(product(ops)) for _ in range(20))
    assert time.monotonic() - start < 10


def test_no_threads_is_refused() -> None:
    with pytest.raises(ConfigError, match="threads must be 1 or more, got 0"):
        CpuOps(threads=0)


def test_teams_side_by_side() -> None:
    """Two engines in one process, and two callers of one engine."""
    teams = [CpuOps(threads=2), CpuOps(threads=2)]

    def work(number: int) -> bool:
        return all(is_right(product(teams[number % 2])) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_threads_end_with_their_team() -> None:
    gc.collect()  # teams of other tests
    before = num_threads_of_process()
    ops = CpuOps(threads=4)
    product(ops)
    assert num_threads_of_process() == before + 3
    del ops
    assert num_threads_of_process() == before


def test_child_of_a_fork_computes() -> None:
    ops = CpuOps(threads=2)
    assert is_right(product(ops))
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hanging child ends
        os._exit(0 if all(is_right(product(ops)) for _ in range(3)) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert is_right(product(ops))


def test_fork_while_another_thread_computes() -> None:
    ops = CpuOps(threads=2)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            product(ops)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                os._exit(0 if is_right(product(ops)) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        worker.join()


def test_idle_threads_sleep() -> None:
    ops = CpuOps(threads=3)
    product(ops)
    time.sleep(0.2)
    used, start = time.process_time(), time.monotonic()
    time.sleep(0.5)
    assert time.process_time() - used < 0.02 * (time.monotonic() - start)
