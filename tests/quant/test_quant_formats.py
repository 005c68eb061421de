"""The registry: which format holds a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.quant import FORMATS, detect_format, load_weight


def test_formats_are_listed_under_their_names() -> None:
    assert all(name == weight_format.name for name, weight_format in FORMATS.items())


@pytest.mark.parametrize(
    ("dtype", "stored", "name"),
    [("F32", torch.float32, "f32"), ("F16", torch.float16, "f16"), ("BF16", torch.bfloat16, "bf16")],
)
def test_dense_matrices(memory_source: Any, dtype: str, stored: torch.dtype, name: str) -> None:
    matrix = torch.randn(4, 6).to(stored)
    source = memory_source({"m.weight": (matrix, (4, 6), dtype)})
    assert detect_format(source, "m") is FORMATS[name]
    assert torch.equal(load_weight(source, "m").dequantize(stored), matrix)


@pytest.mark.parametrize("name", [name for name, weight_format in FORMATS.items() if not weight_format.is_dense])
def test_packed_matrices(memory_source: Any, random_blocks: Any, name: str) -> None:
    weight = random_blocks(name, 3, 256)
    source = memory_source({"m.weight": (weight.tensors["data"], (3, 256), name.upper())})
    loaded = load_weight(source, "m")
    assert (loaded.format.name, loaded.shape) == (name, (3, 256))
    assert loaded.tensors["data"].data_ptr() == weight.tensors["data"].data_ptr()


def test_absent_matrix(memory_source: Any) -> None:
    source = memory_source({"model.norm.weight": (torch.ones(4), (4,), "F32")})
    with pytest.raises(CheckpointError, match=r"model\.norm\.x\.weight"):
        detect_format(source, "model.norm.x")
    with pytest.raises(CheckpointError, match=r"model\.nor\.weight"):
        load_weight(source, "model.nor")


@pytest.mark.parametrize(("part", "dtype"), [("weight", "F64"), ("weight", "IQ1_S"), ("qweight", "I32")])
def test_formats_that_turbolm_lacks(memory_source: Any, part: str, dtype: str) -> None:
    source = memory_source({f"m.{part}": (torch.zeros(2, 2), (2, 2), dtype)})
    with pytest.raises(UnsupportedModelError, match=rf"m\.{part} as {dtype}.*f32.*q4_1"):
        load_weight(source, "m")
