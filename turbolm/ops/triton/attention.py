"""Attention of a step on a GPU: which of its rows go to which kernel.

    decodes (one new token each)                      decode.py
    chunks of few rows (drafts to check, mostly)      decode.py, several rows per sequence
    long chunks without cached context                cuDNN, on q, k and v as they lie in the rows of qkv
    all other chunks                                  prefill.py, in one launch

Whatever cuDNN takes is a multiple of 256 rows, so that it builds few plans; what a chunk has beyond that
goes to the prefill kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as remembered

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.triton.decode import decode_attention, plan_decode
from turbolm.ops.triton.prefill import plan_prefill, prefill_attention, skipped_rows
from turbolm.types import Batch

log = logging.getLogger(__name__)

FEW_ROWS = 64  # query rows (tokens x heads of a group) up to which a chunk goes to the decode kernel
CUDNN_ROWS = 2048  # tokens from which a chunk without cached context goes to cuDNN, a call for each
_MAX_PAIRS = 1 << 17  # sequences x kv heads of a step

#: Attention of decodes: (q rows, block tables, context lens, cache, spec, out, counters), as `decode_attention` of
#: decode.py has them.
Decode = Callable[[Tensor, Tensor, Tensor, LayerCache, AttentionSpec, Tensor, Tensor], None]


@dataclass(slots=True)
class _Gpu:
    """What the kernels need to know of a device, and their counters."""

    num_sms: int
    shared_memory: int  # bytes per multiprocessor, of which 1 KiB is kept per program
    pdl: bool  # programmatic dependent launch
    counters: Tensor  # int32, all 0 between launches
    refused: set[AttentionSpec] = field(default_factory=set)  # by cuDNN


@remembered
def gpu_of(device: torch.device) -> _Gpu:
    """Made by the first call on a device, which must not be under graph capture."""
    counters = torch.zeros(_MAX_PAIRS, dtype=torch.int32, device=device)
    if device.type != "cuda":  # the interpreter
        return _Gpu(2, 228 << 10, False, counters)
    assert not torch.cuda.is_current_stream_capturing(), "run a step before capturing one"
    properties = torch.cuda.get_device_properties(device)
    return _Gpu(
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        torch.cuda.get_device_capability(device) >= (9, 0),
        counters,
    )


def attention(
    qkv_tw: Tensor,
    batch: Batch,
    cache: LayerCache,
    spec: AttentionSpec,
    out: Tensor,
    *,
    decode: Decode | None = None,
) -> None:
    """`Ops.attention` into out [t, num_heads * v_head_dim]. K and V of this step are in the cache. One call at a
    time per device, on one stream: divided work is counted in memory that calls share.

    The first `batch.num_decodes` sequences have one row each; those whose context is 0 get zeros. `batch.chunks`
    are the rest. decode: what computes decodes instead of decode.py.
    """
    gpu = gpu_of(qkv_tw.device)
    assert batch.num_sequences * spec.num_kv_heads <= _MAX_PAIRS
    first = batch.num_decodes
    tables, contexts, starts = batch.block_tables[first:], batch.context_lens[first:], batch.query_start[first:]

    def few(tables: Tensor, contexts: Tensor, starts: Tensor | None = None, longest: int = 1) -> None:
        plan = plan_decode(
            spec, cache, gpu.num_sms, gpu.shared_memory, batch.num_sequences, batch.max_context, longest
        )  # fmt: skip
        decode_attention(
            qkv_tw, tables, contexts, cache, spec, out, plan=plan, counters=gpu.counters,
            max_context=batch.max_context, query_start=starts, max_query=longest, pdl=gpu.pdl,
        )  # fmt: skip

    if first and decode is not None:
        tables_of_decodes, contexts_of_decodes = batch.block_tables[:first], batch.context_lens[:first]
        decode(qkv_tw[:first], tables_of_decodes, contexts_of_decodes, cache, spec, out[:first], gpu.counters)
    elif first:
        few(batch.block_tables[:first], batch.context_lens[:first])
    if not batch.chunks:
        return
    longest = max(rows for _, rows, _ in batch.chunks)
    if longest * (spec.num_heads // spec.num_kv_heads) <= FEW_ROWS:
        few(tables, contexts, starts, longest)
        return
    skip = _attend_fresh(qkv_tw, batch, spec, out, gpu)
    prefill_attention(
        qkv_tw, starts, batch.chunks, tables, contexts, cache, spec, out,
        plan=plan_prefill(spec, qkv_tw.element_size(), gpu.shared_memory - 1024, longest), skip=skip, pdl=gpu.pdl,
    )  # fmt: skip


def _attend_fresh(qkv_tw: Tensor, batch: Batch, spec: AttentionSpec, out: Tensor, gpu: _Gpu) -> int:
    """Long chunks without cached context, by cuDNN. → from how many rows on chunks were taken; 0: none."""
    taken = [(start, skipped_rows(rows, context, CUDNN_ROWS)) for start, rows, context in batch.chunks]
    taken = [(start, rows) for start, rows in taken if rows]
    if not taken or not _fits_cudnn(qkv_tw, spec) or spec in gpu.refused:
        return 0
    try:
        for start, rows in taken:
            _attend_cudnn(qkv_tw[start : start + rows], spec, out[start : start + rows])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no plan for this shape, or a cuDNN too old
        log.warning("cuDNN refused attention of %s, turbolm's kernel takes over: %s", spec, error)
        gpu.refused.add(spec)
        return 0
    return CUDNN_ROWS


def _fits_cudnn(qkv_tw: Tensor, spec: AttentionSpec) -> bool:
    plain = spec.window is None and spec.softcap is None
    sized = spec.head_dim == spec.v_head_dim and spec.head_dim in (64, 128)
    return plain and sized and qkv_tw.is_cuda and qkv_tw.dtype in (torch.bfloat16, torch.float16)


def heads_of(qkv_nw: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views [1, heads, n, d]."""
    k_end = spec.q_width + spec.num_kv_heads * spec.head_dim
    q, k, v = qkv_nw[:, : spec.q_width], qkv_nw[:, spec.q_width : k_end], qkv_nw[:, k_end:]
    dims = (spec.head_dim, spec.head_dim, spec.v_head_dim)
    q, k, v = (x.view(1, qkv_nw.shape[0], -1, dim).transpose(1, 2) for x, dim in zip((q, k, v), dims, strict=True))
    return q, k, v


def _attend_cudnn(qkv_nw: Tensor, spec: AttentionSpec, out: Tensor) -> None:
    """Causal attention of n rows over themselves. Nothing is copied but the result."""
    q, k, v = heads_of(qkv_nw, spec)
    if not can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, True)):
        raise RuntimeError("PyTorch doesn't offer it")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True)
    out.view(out.shape[0], -1, spec.v_head_dim).copy_(result[0].transpose(0, 1))
