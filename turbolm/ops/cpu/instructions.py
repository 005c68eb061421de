"""What the native kernels are called with: the structs of csrc/ops.h, field by field.

Addresses are plain integers; 0 is null. Each struct is an instruction (`head` first) or a part of one.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

# Flags of an instruction; csrc/ops.h says what they mean.
BARRIER, LONE_BARRIER, OWN_INPUT, OWN_OUTPUT, POSTPONED = 1, 2, 4, 8, 16

CACHE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4, "fp8": 5}  # kinds of LayerCache
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class Step(ctypes.Structure):
    """Sizes and batch of one step."""

    opcode: ClassVar[int] = 11  # stands behind the instructions in the table of sizes
    _fields_: ClassVar = [
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("num_logits", c_int64),
        ("table_stride", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("adapters", c_void_p),
    ]


class Instruction(ctypes.Structure):
    """Base of all. `writes` and `updates` name the fields that point to what the instruction
    computes or changes; it reads all others."""

    opcode: ClassVar[int]
    writes: ClassVar[tuple[str, ...]] = ()
    updates: ClassVar[tuple[str, ...]] = ()
    by_row: ClassVar[bool] = False
    """A row of what it computes takes one row of what it reads, and little time."""
    own_input: ClassVar[str] = ""
    """The field that may point to rows of which each thread has a copy."""
    _fields_: ClassVar = [("code", c_int32), ("flags", c_int32)]


class KvPool(ctypes.Structure):
    _fields_: ClassVar = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_scales", c_void_p),
        ("v_scales", c_void_p),
        ("k_range", c_void_p),
        ("v_range", c_void_p),
        ("k_type", c_int32),
        ("v_type", c_int32),
        ("block_size", c_int32),
    ]


class HeadShape(ctypes.Structure):
    _fields_: ClassVar = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("v_head_dim", c_int32),
    ]


class Embedding(Instruction):
    opcode = 0
    writes = ("y",)
    by_row = True
    _fields_: ClassVar = [("table", c_void_p), ("y", c_void_p), ("scale", c_float)]


class Linear(Instruction):
    opcode = 1
    writes = ("y", "workspace")
    own_input = "x"
    _fields_: ClassVar = [("linear", c_void_p), ("x", c_void_p), ("y", c_void_p), ("workspace", c_void_p)]


class RmsNorm(Instruction):
    opcode = 2
    writes = ("y",)
    updates = ("residual",)
    by_row = True
    own_input = "x"
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("eps", c_float),
    ]


class Add(Instruction):
    opcode = 3
    updates = ("residual",)
    by_row = True
    own_input = "x"
    _fields_: ClassVar = [("x", c_void_p), ("residual", c_void_p), ("width", c_int64)]


class RotaryStore(Instruction):
    opcode = 4
    updates = ("qkv",)
    _fields_: ClassVar = [
        ("qkv", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("pool", KvPool),
        ("shape", HeadShape),
        ("rotary_dim", c_int32),
        ("is_interleaved", c_int32),
        ("eps", c_float),
    ]


class Attention(Instruction):
    opcode = 5
    writes = ("y", "workspace")
    _fields_: ClassVar = [
        ("rotary", c_void_p),
        ("qkv", c_void_p),
        ("y", c_void_p),
        ("workspace", c_void_p),
        ("max_context", c_int64),
        ("pool", KvPool),
        ("shape", HeadShape),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class ActivateMultiply(Instruction):
    opcode = 6
    writes = ("y",)
    by_row = True
    own_input = "gate_up"
    _fields_: ClassVar = [("gate_up", c_void_p), ("y", c_void_p), ("width", c_int64), ("activation", c_int32)]


class Gather(Instruction):
    opcode = 7
    writes = ("y",)
    by_row = True
    own_input = "x"
    _fields_: ClassVar = [("x", c_void_p), ("y", c_void_p), ("width", c_int64)]


class Softcap(Instruction):
    opcode = 8
    _fields_: ClassVar = [("width", c_int64), ("cap", c_float)]


class AdapterParts(ctypes.Structure):
    """The columns at which the parts of a merged matrix end."""

    MAX: ClassVar = 3
    _fields_: ClassVar = [("count", c_int32), ("ends", c_int32 * MAX)]


class AdapterShrink(Instruction):
    opcode = 9
    writes = ("y",)
    own_input = "x"
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("a", c_void_p),
        ("ranks", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("max_rank", c_int32),
        ("num_parts", c_int32),
    ]


class AdapterExpand(Instruction):
    opcode = 10
    updates = ("y",)
    _fields_: ClassVar = [
        ("x", c_void_p),
        ("b", c_void_p),
        ("ranks", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("max_rank", c_int32),
        ("parts", AdapterParts),
    ]


#: Every struct whose size the library knows.
KINDS: tuple[type[Step] | type[Instruction], ...] = (
    Embedding, Linear, RmsNorm, Add, RotaryStore, Attention, ActivateMultiply, Gather, Softcap, AdapterShrink,
    AdapterExpand, Step,
)  # fmt: skip
