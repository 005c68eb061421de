"""What a model keeps per token, and the memory for it."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turbolm.kv import LEVELS, KvFormat, KvKind, KvShape
from turbolm.kv_scales import LayerRanges, Ranges
from turbolm.ops import LayerCache

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.uint8,
    "int4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}
_SMALLEST_SCALE = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """All layers' keys and values."""

    layers: tuple[KvShape, ...]
    kv: KvFormat
    ranges: tuple[LayerRanges, ...] = ()
    """Of each layer, for what is stored as int8; none: each token has its own."""

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> list[LayerCache]:
        """The KV pool, a `LayerCache` per layer. On the CPU its memory is taken when first written."""

        def pool(shape: KvShape, dim: int, kind: KvKind) -> tuple[Tensor, Tensor | None]:
            rows = (num_blocks, shape.num_heads, block_size)
            codes = _zeros((*rows, dim // 2 if kind == "int4" else dim), _DTYPES[kind], device)
            return codes, _zeros((*rows, 2), torch.float16, device) if kind in LEVELS else None

        caches = []
        for index, shape in enumerate(self.layers):
            kind_k, kind_v = self.kv.of_layer(index)
            k, k_scales = pool(shape, shape.head_dim, kind_k)
            v, v_scales = pool(shape, shape.v_head_dim, kind_v)
            cache = LayerCache(k, v, k_scales, v_scales, kind_k, kind_v)
            caches.append(_with_ranges(cache, self.ranges[index]) if self.ranges else cache)
        return caches


def _with_ranges(cache: LayerCache, ranges: LayerRanges) -> LayerCache:
    k_range, v_range = (
        _scale_and_minimum(own).to(cache.k.device) if kind == "int8" else None
        for kind, own in ((cache.kind_k, ranges.k), (cache.kind_v, ranges.v))
    )
    return replace(cache, k_range=k_range, v_range=v_range)


def _scale_and_minimum(ranges: Ranges) -> Tensor:
    """float16 [heads, 2] as `LayerCache` has it; no scale is 0."""
    low, high = torch.tensor(ranges, dtype=torch.float64).unbind(1)
    return torch.stack([((high - low) / LEVELS["int8"]).clamp(min=_SMALLEST_SCALE), low], 1).half()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write, and so take, all of it.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
