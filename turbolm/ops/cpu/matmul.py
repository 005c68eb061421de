"""Weight matrices in the layout of the native kernels (csrc/pack.h), ready for csrc/matmul.h."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import torch
from torch import Tensor

from turbolm.ops.cpu.blocks import RowSource, row_source, unpacked_rows
from turbolm.ops.cpu.library import library
from turbolm.weights import Weight

#: Codes of csrc/pack.h's `Format`, by the names of turbolm's weight formats.
FORMATS = {
    "f32": 0, "f16": 1, "bf16": 2,
    "q4_0": 3, "q4_1": 4, "q5_0": 5, "q5_1": 6, "q8_0": 7, "iq4_nl": 8,
    "q4_k": 9, "q5_k": 10, "q6_k": 11, "iq4_xs": 12,
    "q2_k": 13, "q3_k": 14,
}  # fmt: skip

_NAMES = frozenset(FORMATS)

GROUP_ROWS = 16
_ALIGNMENT = 64  # bytes: a cache line, and a 512-bit load
_HUGE_PAGE = 2 << 20
_CHUNK_BYTES = 64 << 20  # memory is taken from the system in pieces of at least this size
_TASK_BYTES = 4 << 20  # packed by one thread at a time


class _LinearPart(ctypes.Structure):
    _fields_: ClassVar = [
        ("format", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("num_parts", ctypes.c_int32),
        ("parts", ctypes.POINTER(_LinearPart)),
    ]


class PackedLinear:
    """Matrices over the same inputs, stacked by output rows, with a bias: y = x · Wᵀ + bias."""

    def __init__(self, in_features: int, parts: Sequence[PackedMatrix], bias: Tensor | None) -> None:
        self.in_features = in_features
        self.out_features = sum(part.n for part in parts)
        self.parts = tuple(parts)
        self.bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        assert self.bias is None or self.bias.shape == (self.out_features,)
        structs, row = [], 0
        for part in self.parts:
            bias_address = None if self.bias is None else self.bias.data_ptr() + 4 * row
            structs.append(_LinearPart(part.format, part.n, part.data.data_ptr(), bias_address))
            row += part.n
        self._structs = (_LinearPart * len(structs))(*structs)
        self._linear = _Linear(in_features, self.out_features, len(structs), self._structs)
        self.address = ctypes.addressof(self._linear)
        """Of the `Linear` struct that the kernels take (csrc/matmul.h)."""

    @property
    def num_bytes(self) -> int:
        return sum(part.data.numel() for part in self.parts) + (0 if self.bias is None else 4 * self.out_features)


class PackedMatrix:
    """One matrix [n, k]: `data` is uint8, all groups of 16 rows."""

    def __init__(self, format_code: int, n: int, k: int) -> None:
        self.format = format_code
        self.n = n
        self.num_groups = -(-n // GROUP_ROWS)
        num_bytes: int = _native().turbolm_pack_size(format_code, n, k)
        self.data, self._owner = _memory.allocate(num_bytes)


def pack(weights: Sequence[Weight], bias: Tensor | None, *, unpack: bool = False) -> PackedLinear | None:
    """The matrices (same k) stacked by output rows; None where the kernels lack a format. `bias`: [n].
    `unpack`: weights become float32, whatever their format."""
    sources = [unpacked_rows(weight, "f32") if unpack else row_source(weight, _NAMES) for weight in weights]
    if any(source is None for source in sources):
        return None
    k = weights[0].shape[1]
    assert all(weight.shape[1] == k for weight in weights), "stacked matrices have the same inputs"
    parts = []
    tasks: list[Callable[[], None]] = []
    for run in _runs([source for source in sources if source is not None]):
        part = PackedMatrix(FORMATS[run[0].format], sum(source.shape[0] for source in run), k)
        parts.append(part)
        group = 0
        for source in run:
            tasks += _tasks(part, source, group)
            group += source.shape[0] // GROUP_ROWS
    _run_all(tasks)
    return PackedLinear(k, parts, bias)


def pack_rows(format_code: int, rows: Tensor, k: int) -> Tensor:
    """uint8: 16 rows, given as bytes, in the kernels' layout."""
    part = PackedMatrix(format_code, GROUP_ROWS, k)
    _native().turbolm_pack(format_code, rows.data_ptr(), GROUP_ROWS, k, 0, 1, part.data.data_ptr())
    return part.data


def workspace_bytes(in_features: int, max_rows: int, num_threads: int) -> int:
    """Scratch memory of a product with up to `max_rows` rows; 64-byte aligned."""
    num_bytes: int = _native().turbolm_matmul_workspace(in_features, max_rows, num_threads)
    return num_bytes


def _runs(sources: Sequence[RowSource]) -> Iterator[list[RowSource]]:
    """Neighbours that make one packed matrix: same format, and groups of 16 rows don't cross weights."""
    run: list[RowSource] = []
    for source in sources:
        fits = run and run[-1].format == source.format and run[-1].shape[0] % GROUP_ROWS == 0
        if run and not fits:
            yield run
            run = []
        run.append(source)
    yield run


def _tasks(part: PackedMatrix, source: RowSource, first_group: int) -> Iterator[Callable[[], None]]:
    """Calls that pack `source` to the groups of `part` from `first_group` on; a few megabytes each."""
    group_bytes = part.data.numel() // part.num_groups
    num_groups = -(-source.shape[0] // GROUP_ROWS)
    step = max(1, _TASK_BYTES // group_bytes)
    for group in range(0, num_groups, step):
        count = min(step, num_groups - group)
        address = part.data.data_ptr() + (first_group + group) * group_bytes
        yield functools.partial(_pack_groups, part.format, source, group, count, address)


def _pack_groups(format_code: int, source: RowSource, group: int, count: int, address: int) -> None:
    """Pack `count` groups of `source` from `group` on to `address`."""
    (n, k), first = source.shape, group * GROUP_ROWS
    last = min(first + count * GROUP_ROWS, n)
    data = source.read(slice(first, last))
    _native().turbolm_pack(format_code, data.data_ptr(), last - first, k, 0, count, address)


def _run_all(tasks: list[Callable[[], None]]) -> None:
    """Side by side on all cores: the kernels don't hold Python's lock."""
    if len(tasks) == 1:
        tasks[0]()
        return
    with ThreadPoolExecutor(min(len(tasks), os.cpu_count() or 1)) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


class _Chunk:
    """Memory from the system, on huge pages where there are some, handed out front to back."""

    def __init__(self, num_bytes: int) -> None:
        # Private: shared memory gets huge pages on few systems.
        memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
        self._free = whole[-whole.data_ptr() % _HUGE_PAGE :][:num_bytes]

    def take(self, num_bytes: int) -> Tensor | None:
        """[num_bytes] bytes, or None where the rest is too small."""
        if num_bytes > self._free.numel():
            return None
        taken = self._free[:num_bytes]
        self._free = self._free[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken


class _Memory:
    """Where packed matrices live. Small ones share chunks, so that they share huge pages too; a chunk
    is returned to the system with its last matrix."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: Callable[[], _Chunk | None] = lambda: None

    def allocate(self, num_bytes: int) -> tuple[Tensor, _Chunk]:
        """uint8 [num_bytes] of zeros, and what must be kept for as long as they are used."""
        with self._lock:
            chunk = self._current()
            data = None if chunk is None else chunk.take(num_bytes)
            if chunk is None or data is None:
                chunk = _Chunk(max(num_bytes, _CHUNK_BYTES))
                data = chunk.take(num_bytes)
                self._current = weakref.ref(chunk)
            assert data is not None
            return data, chunk


_memory = _Memory()


@functools.cache
def _native() -> ctypes.CDLL:
    dll = library()
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    dll.turbolm_pack_size.restype = int64
    dll.turbolm_pack_size.argtypes = [int32, int64, int64]
    dll.turbolm_pack.restype = None
    dll.turbolm_pack.argtypes = [int32, pointer, int64, int64, int64, int64, pointer]
    dll.turbolm_matmul_workspace.restype = int64
    dll.turbolm_matmul_workspace.argtypes = [int64, int64, int32]
    return dll
