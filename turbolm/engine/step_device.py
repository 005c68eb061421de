"""A device that computes steps which are laid out as arrays, without waiting for it: what every rank does alike.

What a step samples stays on the device, where the next step's tokens are taken from.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbolm.engine.batch import StepArrays
from turbolm.engine.graph import DecodeGraphs, Forward
from turbolm.types import Batch

_NUM_BUFFERS = 4  # pinned buffers in turn: more than steps that may be in flight
_POLL_SECONDS = 30e-6

#: `DeviceOps.sample`.
SampleOnDevice = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]

#: Replaces, in place, each id below 0 of the first tensor by the entry -1 - id of the second.
ResolveTokens = Callable[[Tensor, Tensor], None]


class Draws(NamedTuple):
    """How r rows' tokens are chosen, as `DeviceOps.sample` takes it."""

    uniform: NDArray[np.float64]  # [r]
    temperature: NDArray[np.float32]  # [r]
    top_p: NDArray[np.float32]  # [r]
    min_p: NDArray[np.float32]  # [r]
    top_k: NDArray[np.int32]  # [r]
    has_filters: bool

    @staticmethod
    def plain(count: int, *, has_filters: bool) -> Draws:
        """Of `count` rows, at temperature 1."""
        ones = np.ones(count, np.float32)
        zeros = np.zeros(count, np.float32)
        top_k = np.full(count, 40 * has_filters, np.int32)
        return Draws(np.full(count, 0.5), ones, ones, zeros, top_k, has_filters)


class StepDevice:
    """Used by one thread."""

    def __init__(
        self,
        forward: Forward,
        graphs: DecodeGraphs | None,
        device: torch.device,
        sample_rows: SampleOnDevice,
        resolve_tokens: ResolveTokens,
        gather_logits: Callable[[Tensor], Tensor] | None = None,
        rehearsals: Iterable[StepArrays] = (),
    ) -> None:
        """`gather_logits`: of the ranks' parts of logits makes whole ones, where there are ranks.
        `rehearsals`: steps to compute before the first real one, as far as there is time."""
        self._forward = forward
        self._graphs = graphs
        self._device = device
        self._sample_rows = sample_rows
        self._resolve_tokens = resolve_tokens
        self._gather_logits = gather_logits
        self._rehearsals = iter(rehearsals)
        self._buffers = itertools.cycle([_PinnedBuffers(device) for _ in range(_NUM_BUFFERS)])
        self._last_tokens: Tensor | None = None  # int32 [r], of the last step that sampled

    def warm_up(self) -> bool:
        """Prepare a part of what makes steps faster; False: there is nothing left to prepare."""
        rehearsal = next(self._rehearsals, None)
        if rehearsal is not None:
            rows = len(rehearsal.logit_rows)
            last_tokens = self._last_tokens
            self.compute(rehearsal, Draws.plain(rows, has_filters=rows == 1), gathers=False).download().wait()
            self._last_tokens = last_tokens
            return True
        return self._graphs is not None and self._graphs.capture_next()

    @torch.inference_mode()
    def compute(self, arrays: StepArrays, draws: Draws | None, gathers: bool) -> Computed:
        """A step. With `draws` its tokens are chosen; with `gathers` its logits are for the host to choose from."""
        buffers = next(self._buffers)
        logits = self._logits(arrays, buffers)
        if gathers and self._gather_logits is not None:
            logits = self._gather_logits(logits)
        tokens = None
        if draws is not None:
            columns = buffers.columns(draws).upload(self._device)
            tokens = self._last_tokens = self._sample_rows(logits, *columns, draws.has_filters)
        return Computed(logits, tokens, buffers)

    def _logits(self, arrays: StepArrays, buffers: _PinnedBuffers) -> Tensor:
        graphs = self._graphs
        key = None if graphs is None else graphs.find(arrays)
        if graphs is None or key is None:
            batch = self._upload(arrays, buffers)
            self._resolve(batch.token_ids, arrays)
            return self._forward(batch)
        size, host = key[1], buffers.ints(graphs.input_length)
        length = graphs.fill(arrays, size, host.numpy())
        graphs.inputs(length).copy_(host[:length], non_blocking=True)
        self._resolve(graphs.token_ids(size), arrays)
        return graphs.replay(key)[: len(arrays.logit_rows)]

    def _upload(self, arrays: StepArrays, buffers: _PinnedBuffers) -> Batch:
        """The step's inputs, in one copy."""
        parts = arrays[:7]
        offsets = [0, *itertools.accumulate(-(-array.size // 4) * 4 for array in parts)]
        host = buffers.ints(offsets[-1])
        flat = host.numpy()
        for array, offset in zip(parts, offsets, strict=False):
            flat[offset : offset + array.size] = array.reshape(-1)
        device = host[: offsets[-1]].to(self._device, non_blocking=True)
        views = iter([device[o : o + a.size].view(a.shape) for a, o in zip(parts, offsets, strict=False)])
        return arrays.batch(lambda _: next(views))

    def _resolve(self, token_ids: Tensor, arrays: StepArrays) -> None:
        if self._last_tokens is not None and arrays.token_ids.min() < 0:
            self._resolve_tokens(token_ids, self._last_tokens)


class Computed:
    """A step that the device is computing."""

    def __init__(self, logits_rv: Tensor, tokens_r: Tensor | None, buffers: _PinnedBuffers) -> None:
        self.logits = logits_rv  # valid until the next step
        self._tokens = tokens_r
        self._buffers = buffers

    def download(self) -> Download:
        """The tokens, on their way to the host."""
        return self._buffers.download(self._tokens)


class Download:
    """Tokens on their way to the host."""

    def __init__(self, host: Tensor, done: torch.cuda.Event | None) -> None:
        self._host = host
        self._done = done

    def wait(self, check: Callable[[float], None] | None = None) -> list[int]:
        """The tokens. `check` is called with the seconds waited, now and then, and may raise."""
        if self._done is not None and check is not None:
            start = time.monotonic()
            while not self._done.query():  # type: ignore[no-untyped-call]
                check(time.monotonic() - start)
                time.sleep(_POLL_SECONDS)
        elif self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


class _Columns:
    """Sampling parameters of r rows, laid out in one pinned buffer. Each begins at a multiple of 16
    bytes, as kernels are compiled for."""

    def __init__(self, host: Tensor, draws: Draws) -> None:
        self._count = count = len(draws.uniform)
        self._stride = stride = self.size(count) // 24
        self._host = host[: 24 * stride]
        memory: NDArray[Any] = self._host.numpy()
        memory[: 8 * stride].view(np.float64)[:count] = draws.uniform
        floats = memory[8 * stride : 20 * stride].view(np.float32).reshape(3, stride)[:, :count]
        floats[0], floats[1], floats[2] = draws.temperature, draws.top_p, draws.min_p
        memory[20 * stride :].view(np.int32)[:count] = draws.top_k

    @staticmethod
    def size(count: int) -> int:
        """Bytes for `count` rows."""
        return -(-count // 4) * 4 * 24

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """temperature, top_k, top_p, min_p, uniform [r]."""
        count, stride = self._count, self._stride
        memory = self._host.to(device, non_blocking=True)
        temperature, top_p, min_p = memory[8 * stride : 20 * stride].view(torch.float32).view(3, stride)[:, :count]
        top_k = memory[20 * stride :].view(torch.int32)[:count]
        return temperature, top_k, top_p, min_p, memory[: 8 * stride].view(torch.float64)[:count]


class _PinnedBuffers:
    """Memory that the device copies from and to while the host goes on: one step's."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ints = torch.empty(0, dtype=torch.int32)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._tokens = torch.empty(0, dtype=torch.int32)

    def ints(self, size: int) -> Tensor:
        self._ints = self._at_least(self._ints, size)
        return self._ints

    def columns(self, draws: Draws) -> _Columns:
        self._bytes = self._at_least(self._bytes, _Columns.size(len(draws.uniform)))
        return _Columns(self._bytes, draws)

    def download(self, tokens_r: Tensor | None) -> Download:
        count = 0 if tokens_r is None else tokens_r.shape[0]
        self._tokens = self._at_least(self._tokens, count)
        host = self._tokens[:count]
        if tokens_r is not None:
            host.copy_(tokens_r, non_blocking=True)
        if not self._on_gpu:
            return Download(host, None)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Download(host, done)

    def _at_least(self, buffer: Tensor, size: int) -> Tensor:
        if buffer.numel() >= size:
            return buffer
        return torch.empty(2 * size, dtype=buffer.dtype, pin_memory=self._on_gpu)
