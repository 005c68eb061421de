"""What a model keeps per token, and the memory for it."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch

from turbolm.ops import LayerCache


@dataclass(frozen=True, slots=True)
class LayerCacheSpec:
    """One layer's keys and values per token. (Multi-head latent attention: one head whose k is the
    latent with its rotary part, and whose v is the latent.)"""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """All layers' keys and values."""

    layers: tuple[LayerCacheSpec, ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.elements_per_token for layer in self.layers) * self.dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> list[LayerCache]:
        """The KV pool, a `LayerCache` per layer. On the CPU its memory is taken when first written."""

        def pool(layer: LayerCacheSpec, dim: int) -> torch.Tensor:
            shape = (num_blocks, layer.num_kv_heads, block_size, dim)
            if device.type != "cpu":
                return torch.zeros(shape, dtype=self.dtype, device=device)
            # torch.zeros would write, and so take, all of it.
            memory = mmap.mmap(-1, math.prod(shape) * self.dtype.itemsize)
            return torch.frombuffer(memory, dtype=self.dtype).view(shape)

        return [LayerCache(pool(layer, layer.head_dim), pool(layer, layer.v_head_dim)) for layer in self.layers]
