"""Recorded model steps: a list of instructions that the native library replays in one call.

While a `PlanRecorder` is active, the ops of `CpuOps` compute nothing: they append instructions on
`Buffer`s that stand for tensors of the largest step. What differs between steps (sizes, the batch)
is an argument of the replay, so one recording serves every step.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.cpu import instructions, library

if TYPE_CHECKING:
    from turbolm.ops import LayerCache
    from turbolm.types import Batch

ALIGNMENT = 64  # bytes


class NotRecordableError(EngineError):
    """The model needs an op that is not an instruction."""


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of a step: a float32 [rows, width] tensor, or bytes of workspace."""

    shape: tuple[int, ...]
    num_bytes: int
    offset: int = -1  # in the arena, once it is laid out


class Addressed(Protocol):
    """Something in native memory."""

    @property
    def address(self) -> int: ...


#: What a field of an instruction may be given; it gets the address of what has one.
Operand = Tensor | Buffer | Addressed | ctypes.Structure | int | float


@dataclass(slots=True)
class Recorded:
    """An instruction before addresses are known."""

    kind: type[instructions.Instruction]
    operands: dict[str, Operand]
    writes_logits: bool = False
    cache: LayerCache | None = None  # what it reads and writes in the KV pool

    def buffers(self, names: tuple[str, ...] | None = None) -> list[Buffer]:
        """The buffers among the operands (`names`: among these)."""
        chosen = self.operands if names is None else {name: self.operands.get(name) for name in names}
        return [operand for operand in chosen.values() if isinstance(operand, Buffer)]


@dataclass(slots=True)
class PlanRecorder:
    """Collects what the ops of one step emit. Sizes are the largest that the plan shall serve."""

    max_tokens: int
    max_logit_rows: int
    max_context: int
    recorded: list[Recorded] = field(default_factory=list)

    def buffer(self, rows: int, width: int) -> Buffer:
        return Buffer((rows, width), rows * width * 4)

    def workspace(self, num_bytes: int) -> Buffer:
        return Buffer((num_bytes,), num_bytes)


class Plan:
    """A recorded step, ready to run."""

    def __init__(self, team: library.Team, recorder: PlanRecorder, num_logits: int) -> None:
        """`num_logits`: columns of the logits."""
        self._team = team
        self._recorder = recorder
        self._num_logits = num_logits
        self._arena = torch.empty(_lay_out(recorder.recorded) + ALIGNMENT, dtype=torch.uint8)
        base = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        self._instructions = [encode(item.kind, item.operands, base) for item in recorder.recorded]
        _set_barriers(recorder.recorded, self._instructions)
        addresses = [ctypes.addressof(instruction) for instruction in self._instructions]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._run = library.library().turbolm_run
        self._logits = torch.empty(0, num_logits)

    def __len__(self) -> int:
        return len(self._instructions)

    @property
    def num_bytes(self) -> int:
        """Memory for activations. Pages that no step has used take none."""
        return self._arena.numel()

    @property
    def barriers(self) -> list[bool]:
        """Before which instructions the threads meet."""
        return [bool(instruction.barrier) for instruction in self._instructions]

    def run(self, batch: Batch) -> Tensor:
        """Float32 logits [r, vocabulary], valid until the next run. Raises EngineError for a batch
        larger than what was recorded."""
        limits = self._recorder
        num_logits = int(batch.logit_rows.shape[0])
        if (
            batch.num_tokens > limits.max_tokens
            or num_logits > limits.max_logit_rows
            or batch.max_context > limits.max_context
        ):
            raise EngineError(
                f"a step of {batch.num_tokens} tokens, {num_logits} rows of logits and context {batch.max_context}; "
                f"the plan is for {limits.max_tokens}, {limits.max_logit_rows} and {limits.max_context}"
            )
        if self._logits.shape[0] < num_logits:
            self._logits = torch.empty(num_logits, self._num_logits)
        logits = self._logits[:num_logits]
        step = step_of(batch, logits)
        self._run(self._team.handle, self._addresses, len(self._addresses), ctypes.byref(step))
        return logits


def step_of(batch: Batch, logits: Tensor | None = None) -> instructions.Step:
    """The step's struct; the batch must outlive its use."""
    tensors = (
        batch.token_ids, batch.positions, batch.slots, batch.query_start, batch.context_lens, batch.block_tables,
        batch.logit_rows,
    )  # fmt: skip
    for tensor in tensors:
        assert tensor.dtype == torch.int32 and tensor.is_contiguous(), "batches are contiguous int32 tensors"
    return instructions.Step(
        batch.num_tokens,
        batch.num_sequences,
        batch.logit_rows.shape[0],
        batch.block_tables.shape[1],
        *(tensor.data_ptr() for tensor in tensors),
        0 if logits is None else logits.data_ptr(),
    )


def encode(
    kind: type[instructions.Instruction], operands: dict[str, Operand], arena: int = 0
) -> instructions.Instruction:
    """The instruction. `arena`: where the offsets of buffers begin."""
    values = {name: _value(operand, arena) for name, operand in operands.items()}
    return kind(code=kind.opcode, barrier=0, **values)


def _value(operand: Operand, arena: int) -> ctypes.Structure | int | float:
    if isinstance(operand, (int, float, ctypes.Structure)):
        return operand
    if isinstance(operand, Tensor):
        return operand.data_ptr()
    return arena + operand.offset if isinstance(operand, Buffer) else operand.address


def _lay_out(recorded: list[Recorded]) -> int:
    """Give each buffer an offset in the arena: buffers that are never in use at the same time share
    memory. Returns the arena's bytes."""
    last_use: dict[Buffer, int] = {}
    for index, item in enumerate(recorded):
        for buffer in item.buffers():
            last_use[buffer] = index
    live: list[Buffer] = []  # by offset
    size = 0
    for index, item in enumerate(recorded):
        for buffer in item.buffers():
            if buffer.offset < 0:
                buffer.offset = _first_gap(live, buffer.num_bytes)
                live.append(buffer)
                live.sort(key=lambda other: other.offset)
                size = max(size, buffer.offset + buffer.num_bytes)
        live = [buffer for buffer in live if last_use[buffer] > index]
    return size


def _first_gap(live: list[Buffer], num_bytes: int) -> int:
    offset = 0
    for buffer in live:
        if buffer.offset - offset >= num_bytes:
            break
        end = buffer.offset + buffer.num_bytes
        offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
    return offset


def _set_barriers(recorded: list[Recorded], encoded: list[instructions.Instruction]) -> None:
    """A barrier before each instruction that touches what one since the last barrier wrote, or
    writes what one read."""
    reads: list[tuple[int, int]] = []  # since the last barrier: ranges of the arena
    writes: list[tuple[int, int]] = []
    shared: set[object] = set()  # KV pools and the logits
    for item, instruction in zip(recorded, encoded, strict=True):
        changed = [_range(b) for b in item.buffers(item.kind.writes + item.kind.updates)]
        used = [_range(b) for b in item.buffers()]
        others: set[object] = set() if item.cache is None else {item.cache.k.data_ptr()}
        others |= {"logits"} if item.writes_logits else set()
        if _overlap(used, writes) or _overlap(changed, reads) or others & shared:
            instruction.barrier = 1
            reads, writes, shared = [], [], set()
        reads += used
        writes += changed
        shared |= others


def _range(buffer: Buffer) -> tuple[int, int]:
    return buffer.offset, buffer.offset + buffer.num_bytes


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(first < other_end and other < end for first, end in some for other, other_end in others)
