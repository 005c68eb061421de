"""GGUF's packed formats: values exactly as the `gguf` package dequantizes them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from turbolm.quant import FORMATS, gguf_blocks
from turbolm.quant.gguf_blocks import GGML_TYPES, BlockFormat
from turbolm.weights import Weight

PACKED = [name for name, weight_format in FORMATS.items() if not weight_format.is_dense]
QUANTIZABLE = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]  # by the gguf package


def expected_values(weight: Weight) -> np.ndarray:
    data_type = gguf.GGMLQuantizationType[weight.format.name.upper()]
    return gguf.quants.dequantize(weight.tensors["data"].numpy(), data_type)


def test_type_table_is_ggmls() -> None:
    theirs = {int(item): (item.name, *gguf.GGML_QUANT_SIZES[item]) for item in gguf.GGMLQuantizationType}
    common = theirs.keys() & GGML_TYPES.keys()
    assert len(common) > 25
    assert {type_id: tuple(GGML_TYPES[type_id]) for type_id in common} == {i: theirs[i] for i in common}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("n", "k"), [(1, 256), (7, 768)])
def test_values_are_exact(random_blocks: Any, name: str, n: int, k: int) -> None:
    weight = random_blocks(name, n, k)
    values = weight.dequantize(torch.float32)
    assert values.shape == (n, k)
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy(), expected_values(weight))


@pytest.mark.parametrize("name", ["q4_1", "q6_k"])
def test_values_are_exact_over_many_chunks(random_blocks: Any, name: str) -> None:
    weight = random_blocks(name, 701, 1024)
    assert weight.shape[0] * weight.shape[1] > 2 * gguf_blocks._CHUNK_ELEMENTS
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), expected_values(weight))


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantized_values_come_back(name: str) -> None:
    matrix = np.random.default_rng(1).standard_normal((5, 96), dtype=np.float32)
    data = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[name.upper()])
    block_format = FORMATS[name]
    assert isinstance(block_format, BlockFormat)
    values = block_format.pack(torch.from_numpy(data), (5, 96)).dequantize(torch.float32)
    steps = {"q4_0": 15, "q4_1": 15, "q5_0": 31, "q5_1": 31, "q8_0": 254}[name]
    assert np.abs(values.numpy() - matrix).max() < 1.1 * 2 * np.abs(matrix).max() / steps


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_float32_rounded(random_blocks: Any, name: str, dtype: torch.dtype) -> None:
    weight = random_blocks(name, 3, 512)
    assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("name", PACKED)
def test_peak_memory_of_unpacking_is_bounded(random_blocks: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the matrix, only a chunk of it is unpacked at a time."""
    block_format = FORMATS[name]
    assert isinstance(block_format, BlockFormat)
    weight = random_blocks(name, 1100, 512)
    sizes: list[int] = []
    unpack = block_format.unpack
    monkeypatch.setattr(block_format, "unpack", lambda blocks: (sizes.append(blocks.shape[0]), unpack(blocks))[1])
    weight.dequantize(torch.float32)
    assert sum(sizes) == 1100 * 512 // block_format.block_size
    assert max(sizes) * block_format.block_size <= gguf_blocks._CHUNK_ELEMENTS
