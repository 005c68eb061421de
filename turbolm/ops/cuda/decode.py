"""Paged attention of decodes: `kernels/decode.cu`, and what calls it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.kv import KvKind, KvShape
from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.launch import Kernel, Launch
from turbolm.ops.cuda.linear import gpu_of

MAX_GROUP = 8  # query heads per kv head
_TILE = 16  # positions
_KINDS = {"int8": 1, "int4": 2, "fp8": 3}  # the kernel's numbers of codes
_CODE_RINGS = ((16, 4), (16, 3), (16, 2), (12, 4), (12, 3), (12, 2), (8, 3), (8, 2), (4, 3), (4, 2), (2, 2))
_RINGS = ((16, 3), (12, 4), (12, 2), (8, 3), (8, 2), (4, 3), (4, 2), (2, 2))  # warps and depth, the best first
_NOTE = 20  # bytes on a warp's leftovers, each
_RESERVED_SHARED = 1024  # bytes per CTA that the system takes


class Arguments(ctypes.Structure):
    """As the kernel declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scales", "v_scales")),
        *((name, ctypes.c_void_p) for name in ("tables", "contexts", "out")),
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
    kind: KvKind = "bfloat16"  # of K and of V

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        ring = self.depth * _TILE * KvShape(1, self.head_dim, self.head_dim).bytes_per_token(self.kind, self.kind)
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
            "CODES": _KINDS.get(self.kind, 0),
        }


@functools.cache
def variant_for(
    spec: AttentionSpec, block_size: int, dtype: torch.dtype, shared_per_cta: int, kind: KvKind = "bfloat16"
) -> Variant | None:
    """The variant that serves these heads in `shared_per_cta` bytes; None: there is none. dtype: of q."""
    group = spec.num_heads // spec.num_kv_heads
    if spec.head_dim != spec.v_head_dim or spec.head_dim not in (64, 128, 256) or group > MAX_GROUP:
        return None
    if block_size % _TILE or dtype not in (torch.bfloat16, torch.float16) or (kind == "int4" and spec.head_dim < 128):
        return None
    for warps, depth in _CODE_RINGS if kind in _KINDS else _RINGS:
        variant = Variant(
            spec.head_dim, group, spec.num_kv_heads, block_size, spec.window or 0, spec.softcap is not None, dtype,
            warps, depth, kind,
        )  # fmt: skip
        if variant.shared_bytes <= shared_per_cta:
            return variant
    return None


def supports(spec: AttentionSpec, cache: LayerCache, dtype: torch.dtype) -> bool:
    """Whether `decode_attention` serves this cache, and queries of this dtype, on the current GPU."""
    if not cache.k.is_cuda or cache.kind_k != cache.kind_v:
        return False
    return _variant_on(spec, cache.block_size, dtype, cache.kind_k, cache.k.get_device()) is not None


@functools.cache
def _variant_on(
    spec: AttentionSpec, block_size: int, dtype: torch.dtype, kind: KvKind, device_index: int
) -> Variant | None:
    if cuda_kernels_error() is not None:
        return None
    if kind == "fp8" and torch.cuda.get_device_capability(device_index) < (8, 9):
        return None
    if kind not in _KINDS and getattr(torch, kind) != dtype:
        return None
    return variant_for(spec, block_size, dtype, gpu_of(device_index).shared_per_cta, kind)


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
        variant = _variant_on(spec, cache.block_size, q_rows.dtype, cache.kind_k, device_index)
    assert variant is not None, "`supports` was not asked"
    assert all(pool is None or pool.is_contiguous() for pool in (cache.k, cache.v, cache.k_scales, cache.v_scales))
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
    arguments.k_scales = None if cache.k_scales is None else cache.k_scales.data_ptr()
    arguments.v_scales = None if cache.v_scales is None else cache.v_scales.data_ptr()
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
    gpu = gpu_of(device_index)
    cubin = compile_cubin(KERNELS / "decode.cu", variant.defines(), f"sm_{major}{minor}")
    kernel = Kernel(cubin, "decode", device_index, gpu.shared_per_cta)
    ctas_per_sm = max(1, gpu.shared_per_sm // (variant.shared_bytes + _RESERVED_SHARED))
    num_ctas = gpu.num_sms * min(ctas_per_sm, 2048 // (32 * variant.warps))
    overlap = overlap and (major, minor) >= (9, 0)
    launch = Launch(kernel, (num_ctas, 1), 32 * variant.warps, variant.shared_bytes, Arguments(), overlap=overlap)
    return launch, num_ctas
