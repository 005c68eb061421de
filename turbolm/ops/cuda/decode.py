"""Paged attention of decodes: `kernels/decode.cu`, and what calls it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.launch import Kernel, Launch, shared_memory

MAX_GROUP = 8  # query heads per kv head
_TILE = 16  # positions
_RINGS = ((16, 3), (12, 4), (12, 2), (8, 3), (8, 2), (4, 3), (4, 2), (2, 2))  # warps and depth, the best first
_NOTE = 20  # bytes on a warp's leftovers, each
_RESERVED_SHARED = 1024  # bytes per CTA that the system takes


class Arguments(ctypes.Structure):
    """As the kernel declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "tables", "contexts", "out")),
        *((name, ctypes.c_void_p) for name in ("parts", "stats", "counters")),
        *((name, ctypes.c_longlong) for name in ("q_stride", "out_stride", "table_stride")),
        ("num_sequences", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernel is compiled. `warps` of a CTA have `depth` tiles each in flight."""

    head_dim: int
    group: int
    num_kv_heads: int
    block_size: int
    window: int
    softcap: bool
    dtype: torch.dtype
    warps: int
    depth: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        ring = self.depth * _TILE * self.head_dim * 4
        leftover = -(-self.group * (self.head_dim + 2) // 4) * 16
        return self.warps * (ring + leftover + 2 * _NOTE)

    def defines(self) -> dict[str, int]:
        """The macros that make this variant."""
        return {
            "ELEMENT_FP16": int(self.dtype == torch.float16),
            "DIM": self.head_dim,
            "GROUP": self.group,
            "KV_HEADS": self.num_kv_heads,
            "BLOCK_SIZE": self.block_size,
            "WARPS": self.warps,
            "DEPTH": self.depth,
            "WINDOW": self.window,
            "SOFTCAP": int(self.softcap),
        }


@functools.cache
def variant_for(spec: AttentionSpec, block_size: int, dtype: torch.dtype, shared_per_cta: int) -> Variant | None:
    """The variant that serves these heads in `shared_per_cta` bytes; None: there is none."""
    group = spec.num_heads // spec.num_kv_heads
    if spec.head_dim != spec.v_head_dim or spec.head_dim not in (64, 128, 256) or group > MAX_GROUP:
        return None
    if block_size % _TILE or dtype not in (torch.bfloat16, torch.float16):
        return None
    for warps, depth in _RINGS:
        variant = Variant(
            spec.head_dim, group, spec.num_kv_heads, block_size, spec.window or 0, spec.softcap is not None, dtype,
            warps, depth,
        )  # fmt: skip
        if variant.shared_bytes <= shared_per_cta:
            return variant
    return None


def supports(spec: AttentionSpec, cache: LayerCache) -> bool:
    """Whether `decode_attention` serves this cache on the current GPU."""
    if cache.k.dtype != cache.v.dtype or not cache.k.is_cuda or cuda_kernels_error() is not None:
        return False
    shared_per_cta, _ = shared_memory_of(cache.k.get_device())
    return variant_for(spec, cache.block_size, cache.k.dtype, shared_per_cta) is not None


@functools.cache
def shared_memory_of(device_index: int) -> tuple[int, int]:
    """`launch.shared_memory`, asked once."""
    return shared_memory(device_index)


def decode_attention(
    q_rows: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    out: Tensor,
    counters: Tensor,
    *,
    variant: Variant | None = None,
    overlap: bool = True,
) -> None:
    """Attention of each sequence's newest token over its cached context, into `out`.

    q_rows [s, >= q_width] (any row stride), block_tables [s, b] and context_lens [s] int32, out
    [s, num_heads * head_dim] (any row stride); rows of q and out begin at multiples of 16 bytes. A sequence with
    context 0 gets zeros, and its block table is not read. counters: int32 [>= s * num_kv_heads], zero before
    and after. Contexts, tables and the K and V of earlier tokens may be read while the kernel before runs.
    `variant` is for measurements.
    """
    device_index = out.get_device()
    if variant is None:
        shared_per_cta, _ = shared_memory_of(device_index)
        variant = variant_for(spec, cache.block_size, cache.k.dtype, shared_per_cta)
    assert variant is not None, "`supports` was not asked"
    assert cache.k.is_contiguous() and cache.v.is_contiguous()
    launch, num_ctas = _launch(variant, device_index, overlap)
    parts = torch.empty(2 * num_ctas, variant.group, variant.head_dim + 2, dtype=torch.float32, device=out.device)
    fill_arguments(launch.arguments, q_rows, block_tables, context_lens, cache, spec, out, counters, parts, num_ctas)
    launch(device_index)


def fill_arguments(
    arguments: ctypes.Structure,
    q_rows: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    out: Tensor,
    counters: Tensor,
    parts: Tensor,
    num_ctas: int,
) -> None:
    """As `decode_attention` has them; parts: float32 [2 * num_ctas, group, head_dim + 2]."""
    group = spec.num_heads // spec.num_kv_heads
    arguments.q, arguments.k, arguments.v = q_rows.data_ptr(), cache.k.data_ptr(), cache.v.data_ptr()
    arguments.tables, arguments.contexts = block_tables.data_ptr(), context_lens.data_ptr()
    arguments.out, arguments.counters = out.data_ptr(), counters.data_ptr()
    arguments.parts = parts.data_ptr()
    arguments.stats = parts.data_ptr() + 2 * num_ctas * group * spec.head_dim * 4
    arguments.q_stride, arguments.out_stride = q_rows.stride(0), out.stride(0)
    arguments.table_stride = block_tables.stride(0)
    arguments.num_sequences = context_lens.shape[0]
    arguments.scale, arguments.softcap = spec.scale, spec.softcap or 0.0


@functools.cache
def _launch(variant: Variant, device_index: int, overlap: bool) -> tuple[Launch, int]:
    """The launch, and its number of CTAs: as many as run at once."""
    major, minor = torch.cuda.get_device_capability(device_index)
    shared_per_cta, shared_per_sm = shared_memory_of(device_index)
    cubin = compile_cubin(KERNELS / "decode.cu", variant.defines(), f"sm_{major}{minor}")
    kernel = Kernel(cubin, "decode", device_index, shared_per_cta)
    ctas_per_sm = max(1, shared_per_sm // (variant.shared_bytes + _RESERVED_SHARED))
    num_sms = torch.cuda.get_device_properties(device_index).multi_processor_count
    num_ctas = num_sms * min(ctas_per_sm, 2048 // (32 * variant.warps))
    overlap = overlap and (major, minor) >= (9, 0)
    launch = Launch(kernel, (num_ctas, 1), 32 * variant.warps, variant.shared_bytes, Arguments(), overlap=overlap)
    return launch, num_ctas
