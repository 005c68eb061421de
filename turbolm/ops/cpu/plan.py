"""Recorded model steps: a list of instructions that the native library replays in one call.

While a `PlanRecorder` is active, the ops of `CpuOps` compute nothing: they append instructions on
`Buffer`s that stand for tensors of the largest step. What differs between steps (sizes, the batch)
is an argument of the replay, so one recording serves every step.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.cpu import instructions, library

if TYPE_CHECKING:
    from turbolm.ops import LayerCache
    from turbolm.types import Batch

ALIGNMENT = 64  # bytes
_MAX_OWN_WIDTH = 2048  # activations of a row that a thread computes faster than it meets the others
_MAX_FUSED_GROUP = 32  # query heads of a kv head that attention turns itself
_GRACE = 3  # instructions for which a buffer outlives its last use: their results need no barrier before them


class NotRecordableError(EngineError):
    """The model needs an op that is not an instruction."""


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of a step: a float32 [rows, width] tensor, or bytes of workspace."""

    shape: tuple[int, ...]
    num_bytes: int
    offset: int = -1  # in the arena, once it is laid out

    def overlaps(self, other: Buffer) -> bool:
        return self.offset < other.offset + other.num_bytes and other.offset < self.offset + self.num_bytes


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

    def changed(self) -> list[Buffer]:
        """The buffers that it writes."""
        return self.buffers(self.kind.writes + self.kind.updates)


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

    def __init__(
        self, team: library.Team, recorder: PlanRecorder, num_logits: int, hidden: Tensor | None = None
    ) -> None:
        """`num_logits`: columns of the logits. `hidden`: the buffer that `run_hidden` hands out."""
        self._team = team
        self._recorder = recorder
        self._num_logits = num_logits
        recorded = recorder.recorded
        own = _own_buffers(recorded)
        for buffer in own:
            buffer.num_bytes = max(buffer.num_bytes, team.num_threads * (buffer.num_bytes // buffer.shape[0]))
        self._hidden = cast("Buffer | None", hidden)
        self._arena = torch.empty(_lay_out(recorded, self._hidden) + ALIGNMENT, dtype=torch.uint8)
        base = self._base = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        self._instructions = [encode(item.kind, item.operands, base) for item in recorded]
        _mark_own(recorded, self._instructions, own)
        _fuse_rotary(recorded, self._instructions)
        _set_barriers(recorded, self._instructions, set(), instructions.BARRIER)
        _set_barriers(recorded, self._instructions, own, instructions.LONE_BARRIER)
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
        """Before which instructions the threads meet, in steps of several tokens."""
        return [bool(instruction.flags & instructions.BARRIER) for instruction in self._instructions]

    @property
    def lone_barriers(self) -> list[bool]:
        """The same in steps of one token, where each thread does the short work for itself."""
        return [bool(instruction.flags & instructions.LONE_BARRIER) for instruction in self._instructions]

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

    def run_hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `run`, and the hidden states, float32 [t, h], valid until the next run."""
        logits, buffer = self.run(batch), self._hidden
        assert buffer is not None, "a plan of a whole model"
        start = self._base - self._arena.data_ptr() + buffer.offset
        num_bytes = 4 * batch.num_tokens * buffer.shape[1]
        hidden = self._arena[start : start + num_bytes].view(torch.float32)
        return logits, hidden.view(batch.num_tokens, buffer.shape[1])


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
        0 if batch.adapters is None else batch.adapters.data_ptr(),
    )


def encode(
    kind: type[instructions.Instruction], operands: dict[str, Operand], arena: int = 0
) -> instructions.Instruction:
    """The instruction. `arena`: where the offsets of buffers begin."""
    values = {name: _value(operand, arena) for name, operand in operands.items()}
    return kind(code=kind.opcode, flags=0, **values)


def _value(operand: Operand, arena: int) -> ctypes.Structure | int | float:
    if isinstance(operand, (int, float, ctypes.Structure)):
        return operand
    if isinstance(operand, Tensor):
        return operand.data_ptr()
    return arena + operand.offset if isinstance(operand, Buffer) else operand.address


def _lay_out(recorded: list[Recorded], kept: Buffer | None) -> int:
    """Give each buffer an offset in the arena: buffers that are never in use at the same time share
    memory. What is in `kept` stays there until the end. Returns the arena's bytes."""
    last_use: dict[Buffer, int] = {}
    for index, item in enumerate(recorded):
        for buffer in item.buffers():
            last_use[buffer] = len(recorded) if buffer is kept else index
    live: list[Buffer] = []  # by offset
    size = 0
    for index, item in enumerate(recorded):
        for buffer in item.buffers():
            if buffer.offset < 0:
                buffer.offset = _first_gap(live, buffer.num_bytes)
                live.append(buffer)
                live.sort(key=lambda other: other.offset)
                size = max(size, buffer.offset + buffer.num_bytes)
        live = [buffer for buffer in live if last_use[buffer] + _GRACE > index]
    return size


def _first_gap(live: list[Buffer], num_bytes: int) -> int:
    offset = 0
    for buffer in live:
        if buffer.offset - offset >= num_bytes:
            break
        end = buffer.offset + buffer.num_bytes
        offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
    return offset


def _own_buffers(recorded: list[Recorded]) -> set[Buffer]:
    """Those of which each thread has a copy in steps of one token: short work alone writes them, and
    nothing but short work and products reads them."""
    own = {buffer for item in recorded for buffer in item.buffers()}
    while True:
        shared: set[Buffer] = set()
        for item in recorded:
            changed = item.changed()
            is_own = _is_short(item) and own.issuperset(changed)
            shared.update(changed if not is_own else ())
            may_be_own = (item.kind.own_input, *item.kind.writes, *item.kind.updates)
            shared.update(item.buffers(tuple(name for name in item.operands if name not in may_be_own)))
        if own.isdisjoint(shared):
            return own
        own -= shared


def _is_short(item: Recorded) -> bool:
    if item.kind is instructions.ActivateMultiply:
        return cast(int, item.operands["width"]) <= _MAX_OWN_WIDTH
    return item.kind.by_row


def _mark_own(recorded: list[Recorded], encoded: list[instructions.Instruction], own: set[Buffer]) -> None:
    for item, instruction in zip(recorded, encoded, strict=True):
        if not own.isdisjoint(item.buffers((item.kind.own_input,))):
            instruction.flags |= instructions.OWN_INPUT
        if not own.isdisjoint(item.changed()):
            instruction.flags |= instructions.OWN_OUTPUT


def _fuse_rotary(recorded: list[Recorded], encoded: list[instructions.Instruction]) -> None:
    """Attention turns and stores a single token's heads itself, which spares a barrier."""
    for index in range(len(recorded) - 1):
        first, second = recorded[index : index + 2]
        if (first.kind, second.kind) != (instructions.RotaryStore, instructions.Attention):
            continue
        shape = cast(instructions.HeadShape, second.operands["shape"])
        is_same = first.operands["qkv"] is second.operands["qkv"] and first.cache is second.cache
        if is_same and shape.num_heads // shape.num_kv_heads <= _MAX_FUSED_GROUP:
            encoded[index].flags |= instructions.POSTPONED
            cast(instructions.Attention, encoded[index + 1]).rotary = ctypes.addressof(encoded[index])


def _set_barriers(
    recorded: list[Recorded], encoded: list[instructions.Instruction], own: set[Buffer], flag: int
) -> None:
    """A barrier before each instruction that touches what one since the last barrier wrote, or
    writes what one read. `own`: buffers of which each thread touches its own copy alone, which is so
    in steps of one token (`flag` says of which steps this is)."""
    reads: list[Buffer] = []  # since the last barrier
    writes: list[Buffer] = []
    shared: set[object] = set()  # KV pools and the logits

    def meet(some: list[Buffer], others: list[Buffer]) -> bool:
        return any(a.overlaps(b) and not (a is b and a in own) for a in some for b in others)

    for item, instruction in zip(recorded, encoded, strict=True):
        if flag == instructions.LONE_BARRIER and instruction.flags & instructions.POSTPONED:
            continue
        changed, used = item.changed(), item.buffers()
        others: set[object] = set() if item.cache is None else {item.cache.k.data_ptr()}
        others |= {"logits"} if item.writes_logits else set()
        if meet(used, writes) or meet(changed, reads) or others & shared:
            instruction.flags |= flag
            reads, writes, shared = [], [], set()
        reads += used
        writes += changed
        shared |= others
