"""Tensors from a mapped file to the GPU, by several threads through pinned memory.

A plain copy from a mapping is bound by one thread's page faults (2 to 4 GB/s); several threads that
each fill a pinned buffer, and leave the rest to the copy engine, reach the speed of the bus.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 8 << 20  # bytes per copy
_NUM_THREADS = 8
_NUM_BUFFERS = 2 * _NUM_THREADS


class Uploader:
    """Copies to one device. Made once per load; `close` frees its pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "turbolm-upload")
        self._buffers: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            self._buffers.put((torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Contiguous, of one dtype and shape: `source` on the host, `target` on the device. `target` may be
        used on the current stream afterwards."""
        source_bytes, target_bytes = source.reshape(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        starts = range(0, source_bytes.numel(), _CHUNK)
        for done in [self._threads.submit(self._copy_chunk, source_bytes, target_bytes, start) for start in starts]:
            done.result()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _copy_chunk(self, source: Tensor, target: Tensor, start: int) -> None:
        chunk = source[start : start + _CHUNK]
        buffer, is_free = self._buffers.get()
        is_free.synchronize()
        staged = buffer[: chunk.numel()]
        staged.copy_(chunk)
        with torch.cuda.stream(self._stream):
            target[start : start + _CHUNK].copy_(staged, non_blocking=True)
            is_free.record()
        self._buffers.put((buffer, is_free))

    def close(self) -> None:
        self._stream.synchronize()
        self._threads.shutdown()
