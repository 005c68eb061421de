"""The registry: which format holds a matrix."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.errors import CheckpointError, UnsupportedModelError, UserError
from turbolm.quant import FORMATS, find_reader, load_weight, read_packing
from turbolm.quant.awq import Awq
from turbolm.quant.compressed_scheme import Scheme
from turbolm.quant.compressed_tensors import CompressedTensors
from turbolm.quant.gptq import Gptq


def test_formats_are_listed_under_their_names() -> None:
    assert all(name == weight_format.name for name, weight_format in FORMATS.items())


@pytest.mark.parametrize(
    ("dtype", "stored", "name"),
    [("F32", torch.float32, "f32"), ("F16", torch.float16, "f16"), ("BF16", torch.bfloat16, "bf16")],
)
def test_dense_matrices(memory_source: Any, dtype: str, stored: torch.dtype, name: str) -> None:
    matrix = torch.randn(4, 6).to(stored)
    source = memory_source({"m.weight": (matrix, (4, 6), dtype)})
    assert find_reader(source, "m") is FORMATS[name]
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
        find_reader(source, "model.norm.x")
    with pytest.raises(CheckpointError, match=r"model\.nor\.weight"):
        load_weight(source, "model.nor")


@pytest.mark.parametrize(("part", "dtype"), [("weight", "F64"), ("weight", "IQ1_S"), ("qweight", "I32")])
def test_formats_that_turbolm_lacks(memory_source: Any, part: str, dtype: str) -> None:
    source = memory_source({f"m.{part}": (torch.zeros(2, 2), (2, 2), dtype)})
    with pytest.raises(UnsupportedModelError, match=rf"m\.{part} as {dtype}.*f32.*q4_1"):
        load_weight(source, "m")


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "aqlm", "quip", "hqq", "modelopt", "torchao", "exl2", "marlin", "", None, ["awq"], 4]
)
def test_methods_that_turbolm_lacks_are_refused_by_name(method: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_packing({"quant_method": method, "bits": 4})
    assert repr(str(method)) in str(caught.value)
    assert all(word in str(caught.value) for word in ("awq", "gptq", "compressed-tensors", "fp8", "weights='int4'"))


def test_dense_matrices_of_a_quantized_checkpoint(source_of: Any) -> None:
    packing = read_packing({"quant_method": "awq", "bits": 4, "group_size": 32})
    matrix = torch.randn(4, 6)
    assert torch.equal(load_weight(source_of({"m.weight": matrix}), "m", packing).tensors["data"], matrix)
    with pytest.raises(CheckpointError, match=r"no tensor m\.weight"):
        load_weight(source_of({}), "m", packing)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
MIXED = CompressedTensors((Scheme(("re:.*a",), "int4", 32), Scheme(("Linear",), "fp8", activations="static")), ("b",))
CONFIGS: list[dict[str, Any]] = [
    Awq(32).quantization_config(),
    Gptq(32).quantization_config(),
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"},
    MIXED.quantization_config() | {"sparsity_config": {"format": "dense"}, "kv_cache_scheme": None},
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_config_is_read_or_refused(data: st.DataObject) -> None:
    config = copy.deepcopy(data.draw(st.sampled_from(CONFIGS)))
    part: Any = config
    while True:  # walk down to some field
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(JSON)
    with contextlib.suppress(UserError):
        assert read_packing(config).method == config["quant_method"]
