"""What a model keeps per token, and the memory for it."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.kv import LEVELS, KvFormat, KvKind, KvShape
from turbolm.ops import LayerCache

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.uint8,
    "int4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """All layers' keys and values."""

    layers: tuple[KvShape, ...]
    kv: KvFormat

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
            caches.append(LayerCache(k, v, k_scales, v_scales, kind_k, kind_v))
        return caches


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write, and so take, all of it.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
