"""Which kernel computes decodes, and the proof that one of CUDA C++ may: what it makes of a small random cache, held
against Triton's kernel when it is first asked for."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from turbolm import env
from turbolm.errors import ConfigError, EngineError
from turbolm.fallbacks import note_fallback
from turbolm.kv import LEVELS, KvKind
from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.cuda import decode
from turbolm.ops.triton import attention
from turbolm.ops.triton.decode import decode_attention, plan_decode

_CHOICES = ("cuda", "triton")
_CONTEXTS = (1, 17, 0, 130, 64, 515, 2)
_TOLERANCE = 0.02  # of the largest result: both round weights, one of them in another order
_BYTES = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}  # of a dimension

_log = logging.getLogger(__name__)


def kernel_for(spec: AttentionSpec, cache: LayerCache, dtype: torch.dtype) -> attention.Decode | None:
    """What computes attention of decodes over this cache; None: Triton's kernel. The first call for a kind of cache
    runs both kernels, so it must not be under graph capture."""
    if not decode.supports(spec, cache, dtype):
        return None
    return _choose(spec, cache.kind_k, cache.block_size, dtype, cache.k.get_device())


@functools.cache
def _choose(
    spec: AttentionSpec, kind: KvKind, block_size: int, dtype: torch.dtype, device_index: int
) -> attention.Decode | None:
    choice = env.get("TURBOLM_DECODE")
    if choice not in (None, *_CHOICES):
        raise ConfigError(f"TURBOLM_DECODE is {choice!r}; allowed: {', '.join(_CHOICES)}. Unset it for the default.")
    if choice == "triton":
        return None
    if choice is None and kind in _BYTES:
        assert not torch.cuda.is_current_stream_capturing(), "run a step before capturing one"
        reason = disagreement(
            decode.decode_attention, spec, kind, block_size, dtype, torch.device("cuda", device_index)
        )
        if reason is not None:
            note_fallback(_log, f"decode attention over {kind} is left to Triton, which is slower: {reason}")
            return None
    return decode.decode_attention


def disagreement(
    kernel: attention.Decode,
    spec: AttentionSpec,
    kind: KvKind,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """What is wrong with a kernel's attention over codes, by Triton's; None: nothing."""
    generator = torch.Generator(device).manual_seed(0)
    contexts = torch.tensor(_CONTEXTS, dtype=torch.int32, device=device)
    num_blocks, columns = sum(-(-context // block_size) for context in _CONTEXTS), -(-max(_CONTEXTS) // block_size)
    tables = torch.zeros(len(_CONTEXTS), columns, dtype=torch.int32, device=device)
    blocks = torch.randperm(num_blocks, generator=generator, device=device, dtype=torch.int32)
    first = 0
    for row, context in enumerate(_CONTEXTS):
        count = -(-context // block_size)
        tables[row, :count] = blocks[first : first + count]
        first += count
    cache = _random_cache(spec, kind, num_blocks, block_size, generator, device)
    q = torch.randn(len(_CONTEXTS), spec.qkv_width, generator=generator, device=device).to(dtype)
    counters = torch.zeros(len(_CONTEXTS) * spec.num_kv_heads, dtype=torch.int32, device=device)
    found, expected = (q.new_full((len(_CONTEXTS), spec.num_heads * spec.v_head_dim), torch.nan) for _ in range(2))
    gpu = attention.gpu_of(device)
    plan = plan_decode(spec, cache, gpu.num_sms, gpu.shared_memory, len(_CONTEXTS), max(_CONTEXTS))
    try:
        kernel(q, tables, contexts, cache, spec, found, counters)
    except EngineError as error:
        return str(error)
    if bool(counters.any()):
        return "it doesn't put back its counters"
    decode_attention(
        q,
        tables,
        contexts,
        cache,
        spec,
        expected,
        plan=plan,
        counters=counters,
        max_context=max(_CONTEXTS),
        pdl=gpu.pdl,
    )
    off, largest = (found.float() - expected.float()).abs().max().item(), expected.float().abs().max().item()
    if off <= _TOLERANCE * largest:  # not so if it is NaN
        return None
    return f"its result is {off:.3g} off on a test, of {largest:.3g} at most"


def _random_cache(
    spec: AttentionSpec,
    kind: KvKind,
    num_blocks: int,
    block_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> LayerCache:
    """Any codes, and scales and minima by which they stand for numbers of about 1."""

    def codes(dim: int) -> Tensor:
        shape = (num_blocks, spec.num_kv_heads, block_size, int(dim * _BYTES[kind]))
        if kind == "fp8":
            return torch.randn(shape, generator=generator, device=device).to(torch.float8_e4m3fn)
        return torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)

    def scales() -> Tensor | None:
        if kind not in LEVELS:
            return None
        shape = (num_blocks, spec.num_kv_heads, block_size, 1)
        scale = (1 + torch.rand(shape, generator=generator, device=device)) * 2 / LEVELS[kind]
        minimum = -1 - torch.rand(shape, generator=generator, device=device)
        return torch.cat([scale, minimum], 3).half()

    return LayerCache(codes(spec.head_dim), codes(spec.v_head_dim), scales(), scales(), kind, kind)
