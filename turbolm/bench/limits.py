"""What the machine can do at most: how fast memory is read, how fast matrices are multiplied."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_MIN_COLD_BYTES = 160 << 20
_HUGE_PAGE = 2 << 20
_GEMM_SIZE = 1536
_SECONDS = 0.4  # for each figure


@dataclass(frozen=True, slots=True)
class Limits:
    """Best figures of this machine."""

    read: dict[int, float]  # number of threads → bytes per second that they read from memory together
    int8: float  # operations per second of PyTorch's product of int8 matrices, with all threads
    float32: float  # and of float32 ones

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements of the same machine, figure by figure."""
        read = {count: max(rate, other.read[count]) for count, rate in self.read.items()}
        return Limits(read, max(self.int8, other.int8), max(self.float32, other.float32))


def measure_limits(threads: int) -> Limits:
    """With up to `threads` threads; takes about two seconds."""
    counts = sorted({1, threads, *(1 << n for n in range(threads.bit_length()) if 1 << n < threads)})
    buffer = _touched(cold_bytes())
    read = {count: read_rate(buffer, count) for count in counts}
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Limits(read, _int8_rate(), _float32_rate())
    finally:
        torch.set_num_threads(previous)


def cold_bytes(root: Path = Path("/")) -> int:
    """Bytes that no cache holds: several times the last level's."""
    largest = 0
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        largest = max(largest, int(text.rstrip("KM") or 0) * unit)
    return max(_MIN_COLD_BYTES, 4 * largest)


def best_seconds(call: Callable[[], object], limit: float = _SECONDS) -> float:
    """The shortest of as many calls as fit `limit` seconds, at least three: other load on the machine only adds."""
    best, start, done = float("inf"), time.perf_counter(), 0
    while done < 3 or time.perf_counter() - start < limit:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        done += 1
    return best


def read_rate(buffer: torch.Tensor, threads: int) -> float:
    """Bytes per second. Each thread looks for an absent byte with the C library's memchr, which does nothing but
    load, and holds no lock of Python's meanwhile."""
    search = ctypes.CDLL(None).memchr
    search.argtypes, search.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    part = buffer.numel() // threads

    def scan(number: int) -> None:
        assert search(buffer.data_ptr() + number * part, 0, part) is None

    def scan_all() -> None:
        others = [threading.Thread(target=scan, args=(number,)) for number in range(1, threads)]
        for thread in others:
            thread.start()
        scan(0)
        for thread in others:
            thread.join()

    return part * threads / best_seconds(scan_all)


def _touched(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of ones, on huge pages where there are some."""
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
    return whole[-whole.data_ptr() % _HUGE_PAGE :][:num_bytes].fill_(1)


def _int8_rate() -> float:
    a = torch.randint(-8, 8, (_GEMM_SIZE, _GEMM_SIZE), dtype=torch.int8)
    return 2.0 * _GEMM_SIZE**3 / best_seconds(lambda: torch._int_mm(a, a))


def _float32_rate() -> float:
    a = torch.randn(_GEMM_SIZE, _GEMM_SIZE)
    return 2.0 * _GEMM_SIZE**3 / best_seconds(lambda: torch.mm(a, a))
