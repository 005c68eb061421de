"""A device that computes steps which are laid out as arrays, without waiting for it: what every rank does alike.

What a step samples stays on the device, where the next step's tokens are taken from.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbolm.engine.adjustments import HostAdjustments
from turbolm.engine.batch import Ints, StepArrays
from turbolm.engine.graph import DecodeGraphs, Forward, ForwardHidden, GraphKey
from turbolm.engine.pooling import RowRange, sum_rows
from turbolm.ops.adjustments import FLOATS, Adjustments
from turbolm.types import Batch

_NUM_BUFFERS = 4  # pinned buffers in turn: more than steps that may be in flight
_POLL_SECONDS = 30e-6

#: `DeviceOps.sample`.
SampleOnDevice = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]

#: `ops.adjustments.adjust`.
AdjustRows = Callable[[Tensor, Tensor, Adjustments, Tensor], None]

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
        forward_hidden: ForwardHidden | None = None,
        adjust: AdjustRows | None = None,
        counts_shape: tuple[int, int] = (0, 0),
    ) -> None:
        """`gather_logits`: of the ranks' parts of logits makes whole ones, where there are ranks.
        `rehearsals`: steps to compute before the first real one, as far as there is time. `forward_hidden`: for
        steps with `pools`; without it there are none. `adjust` makes adjustments, and `counts_shape` is (s, v) of what
        it counts: without it, the host makes them."""
        self._forward = forward
        self._forward_hidden = forward_hidden
        self._graphs = graphs
        self._device = device
        self._sample_rows = sample_rows
        self._resolve_tokens = resolve_tokens
        self._gather_logits = gather_logits
        self._rehearsals = iter(rehearsals)
        self._buffers = itertools.cycle([_PinnedBuffers(device) for _ in range(_NUM_BUFFERS)])
        self._last_tokens: Tensor | None = None  # int32 [r], of the last step that sampled
        self.num_replays = 0  # steps computed by a graph
        self._no_tokens = torch.full((1,), -1, dtype=torch.int32, device=device)
        self._adjust = adjust
        self._counts_shape = counts_shape
        self._counts: Tensor | None = None  # int32 [s, v], once there are any

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
    def compute(
        self,
        arrays: StepArrays,
        draws: Draws | None,
        gathers: bool,
        pools: list[RowRange] | None = None,
        adjustments: HostAdjustments | None = None,
    ) -> Computed:
        """A step. With `draws` its tokens are chosen; with `gathers` its logits are for the host to choose from.
        `pools`: rows whose hidden states are summed. `adjustments` are made before tokens are chosen."""
        buffers = next(self._buffers)
        sums = None
        if pools and self._forward_hidden is not None:
            batch = self._upload(arrays, buffers)
            self._resolve(batch.token_ids, arrays)
            logits, hidden = self._forward_hidden(batch)
            sums = sum_rows(hidden, pools)
        else:
            logits = self._logits(arrays, buffers)
        if gathers and self._gather_logits is not None:
            logits = self._gather_logits(logits)
        tokens = None
        if draws is not None:
            if adjustments is not None:
                self._adjust_rows(logits, adjustments, buffers)
            columns = buffers.columns(draws).upload(self._device)
            tokens = self._last_tokens = self._sample_rows(logits, *columns, draws.has_filters)
        return Computed(logits, tokens, sums, buffers)

    @property
    def num_slots(self) -> int:
        """Sequences whose tokens can be counted; 0: the device makes no adjustments."""
        return 0 if self._adjust is None else self._counts_shape[0]

    def _adjust_rows(self, logits_rv: Tensor, adjustments: HostAdjustments, buffers: _PinnedBuffers) -> None:
        assert self._adjust is not None, "num_slots says so"
        if self._counts is None:
            self._counts = torch.zeros(self._counts_shape, dtype=torch.int32, device=self._device)
        for slot in adjustments.cleared:
            self._counts[slot].zero_()
        *parts, _ = adjustments
        flat = [part.view(np.int32) for part in parts]
        sent = iter(_send(flat, buffers.adjustments(_length(flat)), self._device))
        fields = {
            name: (tensor.view(torch.float32) if name in FLOATS else tensor).view(part.shape)
            for name, part, tensor in zip(Adjustments._fields, parts, sent, strict=True)
        }
        previous = self._no_tokens if self._last_tokens is None else self._last_tokens
        self._adjust(logits_rv[:, : self._counts_shape[1]], self._counts, Adjustments(**fields), previous)

    def has_graph(self, arrays: StepArrays) -> bool:
        """Whether a captured graph serves the step."""
        return self._key(arrays) is not None

    def _key(self, arrays: StepArrays) -> GraphKey | None:
        return None if self._graphs is None else self._graphs.find(arrays)

    def _logits(self, arrays: StepArrays, buffers: _PinnedBuffers) -> Tensor:
        graphs, key = self._graphs, self._key(arrays)
        if graphs is None or key is None:
            batch = self._upload(arrays, buffers)
            self._resolve(batch.token_ids, arrays)
            return self._forward(batch)
        size, wanted = key.size, arrays.logit_rows
        host = buffers.ints(graphs.input_length + len(wanted))
        length = graphs.fill(arrays, size, host.numpy())
        graphs.inputs(length).copy_(host[:length], non_blocking=True)
        self._resolve(graphs.token_ids(size), arrays)
        self.num_replays += 1
        logits = graphs.replay(key)
        if len(wanted) == len(arrays.token_ids):
            return logits[: len(wanted)]
        host.numpy()[length : length + len(wanted)] = wanted
        rows = logits.index_select(0, host[length : length + len(wanted)].to(self._device, non_blocking=True))
        # Ranks choose tokens where a graph leaves its logits, which is where the others look for them.
        return rows if self._gather_logits is None else logits[: len(wanted)].copy_(rows)

    def _upload(self, arrays: StepArrays, buffers: _PinnedBuffers) -> Batch:
        """The step's inputs, in one copy."""
        parts = [*arrays[:7], *(() if arrays.adapters is None else (arrays.adapters,))]
        views = iter(_send(parts, buffers.ints(_length(parts)), self._device))
        return arrays.batch(lambda _: next(views))

    def _resolve(self, token_ids: Tensor, arrays: StepArrays) -> None:
        if self._last_tokens is not None and arrays.token_ids.min() < 0:
            self._resolve_tokens(token_ids, self._last_tokens)


def _length(parts: Sequence[Ints]) -> int:
    """Elements that `_send` lays out: each part begins at a multiple of 16 bytes, as kernels are compiled for."""
    return sum(-(-part.size // 4) * 4 for part in parts)


def _send(parts: Sequence[Ints], host: Tensor, device: torch.device) -> list[Tensor]:
    """The parts on the device, in one copy through `host`, which has room for `_length`."""
    offsets = [0, *itertools.accumulate(-(-part.size // 4) * 4 for part in parts)]
    flat = host.numpy()
    for part, offset in zip(parts, offsets, strict=False):
        flat[offset : offset + part.size] = part.reshape(-1)
    sent = host[: offsets[-1]].to(device, non_blocking=True)
    return [sent[offset : offset + part.size].view(part.shape) for part, offset in zip(parts, offsets, strict=False)]


class Computed:
    """A step that the device is computing."""

    def __init__(
        self, logits_rv: Tensor, tokens_r: Tensor | None, sums_eh: Tensor | None, buffers: _PinnedBuffers
    ) -> None:
        self.logits = logits_rv  # valid until the next step
        self.sums = sums_eh  # of pooled rows
        self._tokens = tokens_r
        self._buffers = buffers

    @torch.inference_mode()
    def download(self) -> Download:
        """The tokens and sums, on their way to the host."""
        return self._buffers.download(self._tokens, self.sums)


class Download:
    """Tokens, and sums of pooled rows, on their way to the host."""

    def __init__(self, host: Tensor, sums: Tensor | None, done: torch.cuda.Event | None) -> None:
        self.sums = sums  # [e, h], to be read after `wait`
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
        self._adjustments = torch.empty(0, dtype=torch.int32)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._tokens = torch.empty(0, dtype=torch.int32)

    def ints(self, size: int) -> Tensor:
        self._ints = self._at_least(self._ints, size)
        return self._ints

    def adjustments(self, size: int) -> Tensor:
        self._adjustments = self._at_least(self._adjustments, size)
        return self._adjustments

    def columns(self, draws: Draws) -> _Columns:
        self._bytes = self._at_least(self._bytes, _Columns.size(len(draws.uniform)))
        return _Columns(self._bytes, draws)

    def download(self, tokens_r: Tensor | None, sums_eh: Tensor | None) -> Download:
        count = 0 if tokens_r is None else tokens_r.shape[0]
        self._tokens = self._at_least(self._tokens, count)
        host = self._tokens[:count]
        if tokens_r is not None:
            host.copy_(tokens_r, non_blocking=True)
        if not self._on_gpu:
            return Download(host, sums_eh, None)
        sums = None
        if sums_eh is not None:
            sums = torch.empty(sums_eh.shape, dtype=sums_eh.dtype, pin_memory=True)
            sums.copy_(sums_eh, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Download(host, sums, done)

    def _at_least(self, buffer: Tensor, size: int) -> Tensor:
        if buffer.numel() >= size:
            return buffer
        return torch.empty(2 * size, dtype=buffer.dtype, pin_memory=self._on_gpu)
