"""Weight sources held in memory, and random packed matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from turbolm.models.safetensors import DTYPES
from turbolm.quant import FORMATS
from turbolm.quant.gguf_blocks import BlockFormat
from turbolm.weights import TensorInfo, Weight

#: Bytes of a block at which a float16 scale or minimum stands (ggml-common.h).
FLOAT16_OFFSETS = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "iq4_nl": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_xs": (0,),
}


class MemorySource:
    """A WeightSource of {name: (tensor, shape in elements, dtype name)}."""

    def __init__(self, entries: Mapping[str, tuple[torch.Tensor, tuple[int, ...], str]]) -> None:
        self._data = {name: data for name, (data, _, _) in entries.items()}
        self.tensors = {
            name: TensorInfo(name, shape, dtype, data.numel() * data.element_size())
            for name, (data, shape, dtype) in entries.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._data[name]

    def release(self, name: str) -> None: ...


def random_blocks(name: str, n: int, k: int, seed: int = 0) -> Weight:
    """A matrix of random bytes, but for the scales, which are finite."""
    block_format = FORMATS[name]
    assert isinstance(block_format, BlockFormat)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n * k // block_format.block_size, block_format.block_width), dtype=np.uint8)
    for offset in FLOAT16_OFFSETS[name]:
        scales = rng.standard_normal((blocks.shape[0], 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return block_format.pack(torch.from_numpy(blocks.reshape(n, -1)), (n, k))


def source_of(tensors: Mapping[str, torch.Tensor]) -> MemorySource:
    """A WeightSource of plain tensors, as a safetensors file has them."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return MemorySource({name: (t, tuple(t.shape), names[t.dtype]) for name, t in tensors.items()})


@pytest.fixture(name="source_of")
def source_of_fixture() -> object:
    return source_of


@pytest.fixture
def memory_source() -> type[MemorySource]:
    return MemorySource


@pytest.fixture(name="random_blocks")
def random_blocks_fixture() -> object:
    return random_blocks
