"""Runs steps on a GPU without waiting for them: the host prepares the next step while the device computes.

What a step samples stays on the device, where the next step's tokens are taken from, and is copied to
the host besides. Only where a request asks for what the host has to compute (penalties, bans,
log-probabilities) is a step's result awaited at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from turbolm.engine.batch import Ints, StepArrays, lay_out, num_columns
from turbolm.engine.graph import DecodeGraphs, Forward, Limits
from turbolm.engine.randomness import uniform
from turbolm.engine.runner import Completed, compute_results, logit_rows_of, no_distribution
from turbolm.engine.sampler import Sampler
from turbolm.engine.sequence_table import SequenceTable
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.types import Batch, Sequence

_NUM_BUFFERS = 4  # pinned buffers in turn: more than steps that may be in flight

#: `DeviceOps.sample`.
SampleOnDevice = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]

#: Replaces, in place, each id below 0 of the first tensor by the entry -1 - id of the second.
ResolveTokens = Callable[[Tensor, Tensor], None]


class DeviceRunner:
    """A `StepRunner` for a GPU (or, without graphs, for tests, any device). Used by one thread."""

    depth = 2

    def __init__(
        self,
        forward: Forward,
        graphs: DecodeGraphs | None,
        limits: Limits,
        block_size: int,
        device: torch.device,
        vocab_size: int,
        sample_rows: SampleOnDevice,
        resolve_tokens: ResolveTokens,
    ) -> None:
        """`sample_rows`: on the device, without waiting for it. `vocab_size`: tokens that may be chosen."""
        self._forward = forward
        self._graphs = graphs
        self._block_size = block_size
        self._device = device
        self._vocab_size = vocab_size
        self._sample_rows = sample_rows
        self._resolve_tokens = resolve_tokens
        self._sampler = Sampler()
        self._table = SequenceTable(2 * limits.max_batch_size, num_columns(limits.max_context, block_size))
        self._counting = np.arange(limits.max_batch_size + 1, dtype=np.int32)
        self._buffers = itertools.cycle([_PinnedBuffers(device) for _ in range(_NUM_BUFFERS)])
        self._last_tokens: Tensor | None = None  # int32 [r], of the last step that sampled
        self._last_rows: dict[Sequence, int] = {}

    def warm_up(self) -> bool:
        """Prepare a part of what makes steps faster; False: there is nothing left to prepare."""
        return self._graphs is not None and self._graphs.capture_next()

    @torch.inference_mode()
    def submit(self, step: Step) -> Completed | _InFlight:
        """Start computing a step. Steps are computed in the order in which they are submitted."""
        items = step.items
        rows = self._table.rows(items)
        is_plain = bool(self._table.is_plain[rows].all())
        samples = [item.samples for item in items]
        if is_plain and step.num_tokens == len(items) and all(samples):
            arrays = self._lay_out_decodes(items, rows)
        else:
            arrays = lay_out(step, self._block_size, [logit_rows_of(item) for item in items], self._last_rows)
        buffers = next(self._buffers)
        logits = self._compute(arrays, buffers)
        if not is_plain:
            results, tokens = compute_results(logits, items, self._sampler, self._vocab_size)
            self._remember(torch.tensor(tokens, dtype=torch.int32, device=self._device), items)
            return Completed(results)
        if not all(samples):
            rows, positions = rows[samples], arrays.context_lens[samples]
        else:
            positions = arrays.context_lens
        if not len(rows):
            return _InFlight(items, buffers.download(torch.empty(0, dtype=torch.int32, device=self._device)))
        tokens_r = self._sample(logits[:, : self._vocab_size], rows, positions, buffers)
        self._remember(tokens_r, items)
        return _InFlight(items, buffers.download(tokens_r))

    def _lay_out_decodes(self, items: tuple[ScheduledSequence, ...], rows: Ints) -> StepArrays:
        """`lay_out` of a step in which each sequence computes one token."""
        size, count, last_rows = self._block_size, len(items), self._last_rows
        positions = np.array([item.start for item in items], np.int32)
        token_ids = [
            -1 - last_rows[item.sequence] if item.follows else item.sequence.token_ids[item.start] for item in items
        ]
        contexts = positions + 1
        longest = int(contexts.max())
        tables = self._table.block_tables[rows, : num_columns(longest, size)]
        counting = self._counting[: count + 1]
        slots = tables[counting[:-1], positions // size] * size + positions % size
        token_array = np.array(token_ids, np.int32)
        return StepArrays(
            token_array, positions, slots, counting, contexts, tables, counting[:-1], 1, longest, count, ()
        )

    def _compute(self, arrays: StepArrays, buffers: _PinnedBuffers) -> Tensor:
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

    def _sample(self, logits_rv: Tensor, rows: Ints, positions: Ints, buffers: _PinnedBuffers) -> Tensor:
        """`positions`: of the tokens to choose, in their sequences."""
        table, columns = self._table, buffers.columns(len(rows))
        columns.uniform[:] = uniform(table.key[rows], (positions - table.num_prompt[rows]).astype(np.int64))
        columns.temperature[:] = table.temperature[rows]
        columns.top_p[:] = table.top_p[rows]
        columns.min_p[:] = table.min_p[rows]
        columns.top_k[:] = table.top_k[rows]
        has_filters = bool(table.has_filters[rows].any())
        return self._sample_rows(logits_rv, *columns.upload(self._device), has_filters)

    def _remember(self, tokens_r: Tensor, items: tuple[ScheduledSequence, ...]) -> None:
        """Where each sampled token is, for the step that follows it."""
        self._last_tokens = tokens_r
        sampling = [item.sequence for item in items if item.samples]
        self._last_rows = dict(zip(sampling, range(len(sampling)), strict=True))


class _InFlight:
    """A step that the device is computing."""

    def __init__(self, items: tuple[ScheduledSequence, ...], download: _Download) -> None:
        self._items = items
        self._download = download

    def results(self) -> list[StepResult]:
        tokens = iter(self._download.wait())
        return [_result(next(tokens)) if item.samples else StepResult() for item in self._items]


def _result(token: int) -> StepResult:
    return StepResult((token,)) if token >= 0 else StepResult(error=no_distribution())


class _Columns:
    """Sampling parameters of r rows, laid out in one pinned buffer. Each begins at a multiple of 16
    bytes, as kernels are compiled for."""

    def __init__(self, host: Tensor, count: int) -> None:
        self._count = count
        self._stride = stride = self.size(count) // 24
        self._host = host[: 24 * stride]
        memory = self._host.numpy()
        self.uniform = memory[: 8 * stride].view(np.float64)[:count]
        floats = memory[8 * stride : 20 * stride].view(np.float32).reshape(3, stride)[:, :count]
        self.temperature, self.top_p, self.min_p = floats
        self.top_k = memory[20 * stride :].view(np.int32)[:count]

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


class _Download:
    """Tokens on their way to the host."""

    def __init__(self, host: Tensor, done: torch.cuda.Event | None) -> None:
        self._host = host
        self._done = done

    def wait(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


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

    def columns(self, count: int) -> _Columns:
        self._bytes = self._at_least(self._bytes, _Columns.size(count))
        return _Columns(self._bytes, count)

    def download(self, tokens_r: Tensor) -> _Download:
        self._tokens = self._at_least(self._tokens, tokens_r.shape[0])
        host = self._tokens[: tokens_r.shape[0]]
        host.copy_(tokens_r, non_blocking=True)
        if not self._on_gpu:
            return _Download(host, None)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return _Download(host, done)

    def _at_least(self, buffer: Tensor, size: int) -> Tensor:
        if buffer.numel() >= size:
            return buffer
        return torch.empty(2 * size, dtype=buffer.dtype, pin_memory=self._on_gpu)
