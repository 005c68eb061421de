"""AutoAWQ's packing against one written out word by word; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.quant import load_weight, read_packing
from turbolm.quant.awq import Awq
from turbolm.quant.int4 import int4
from turbolm.weights import Weight

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: the row that each nibble of a word holds


def words(values: np.ndarray) -> torch.Tensor:
    """[r, n] of 0..15 → int32 [r, n/8]"""
    packed = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for word in range(packed.shape[1]):
        for place, row in enumerate(ORDER):
            packed[:, word] |= values[:, 8 * word + row].astype(np.uint32) << 4 * place
    return torch.from_numpy(packed.view(np.int32))


def random_parts(n: int, k: int, group: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A module's tensors, and the matrix [n, k] that they mean."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    scales = rng.random((k // group, n)).astype(np.float16)
    matrix = (codes - zeros.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)
    parts = {"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": torch.from_numpy(scales)}
    return parts, torch.from_numpy(matrix.T.astype(np.float32))


@pytest.mark.parametrize(("k", "group"), [(64, 32), (256, 128), (96, 96)])
def test_load(source_of: Any, k: int, group: int) -> None:
    parts, matrix = random_parts(24, k, group)
    weight = load_weight(source_of(parts), "m", read_packing(CONFIG | {"group_size": -1 if group == 96 else group}))
    assert (weight.format.name, weight.shape) == ("int4", (24, k))
    assert torch.equal(weight.dequantize(torch.float32), matrix)


def random_weight(n: int, k: int, group: int, largest_zero: int = 15) -> Weight:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    zeros = torch.randint(0, largest_zero + 1, (n, k // group), dtype=torch.uint8)
    return int4(codes, torch.rand(n, k // group).half(), zeros)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.integers(1, 4), groups=st.integers(1, 3), group=st.sampled_from([2, 32, 64]))
def test_what_is_packed_is_loaded_again(source_of: Any, words: int, groups: int, group: int) -> None:
    weight, packing = random_weight(8 * words, groups * group, group), Awq(group)
    loaded = packing.load(source_of(packing.pack("m", weight)), "m")
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in weight.tensors.items())


def test_the_config_that_is_written_is_read_again() -> None:
    for group in (32, -1):
        config = Awq(group).quantization_config(ignore=["lm_head"])
        assert config["modules_to_not_convert"] == ["lm_head"]
        assert read_packing(config) == Awq(group)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": "gemv"}, "'version'.*'gemv'.*'gemm'"),
        ({"version": "GEMV_FAST"}, "gemv_fast"),
        ({"version": "marlin"}, "marlin"),
        ({"version": None, "format": "llm-awq"}, "llm-awq"),
        ({"bits": 3}, "'bits'.*3"),
        ({"bits": 4.0}, "'bits'"),
        ({"group_size": 0}, "'group_size'"),
        ({"group_size": None}, "'group_size'"),
        ({"desc_act": True}, "'desc_act'"),
        ({"zero_point": "yes"}, "'zero_point'"),
        ({"rotation": "hadamard"}, "field 'rotation'"),
    ],
)
def test_variants_that_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"awq.*{named}") as caught:
        read_packing(CONFIG | change)
    assert "unquantized model" in str(caught.value)


@pytest.mark.parametrize(
    ("group", "change", "named"),
    [
        (64, {}, r"m\.scales is F16 \[2, 24\].*\[1, 24\]: groups of 64"),
        (-1, {}, r"m\.scales"),
        (32, {"m.scales": None}, r"no tensor m\.scales"),
        (32, {"m.qzeros": None}, r"no tensor m\.qzeros"),
        (32, {"m.qzeros": torch.zeros(2, 2, dtype=torch.int32)}, r"m\.qzeros is I32 \[2, 2\].*\[2, 3\]"),
        (32, {"m.qweight": torch.zeros(64, dtype=torch.int32)}, r"m\.qweight is I32 \[64\]"),
        (32, {"m.qweight": torch.zeros(64, 3)}, r"m\.qweight is F32"),
        (32, {"m.scales": torch.full((2, 24), torch.nan).half()}, r"m\.scales holds.*not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(source_of: Any, group: int, change: dict[str, Any], named: str) -> None:
    parts = random_parts(24, 64, 32)[0] | change
    source = source_of({name: tensor for name, tensor in parts.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=named):
        load_weight(source, "m", Awq(group))


def test_columns_that_are_not_whole_groups(source_of: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"m\.qweight: 64 input columns are not whole groups.*48"):
        load_weight(source_of(random_parts(24, 64, 32)[0]), "m", Awq(48))


def test_matrices_that_the_packing_can_not_hold() -> None:
    weight = random_weight(8, 64, 32)
    with pytest.raises(ConfigError, match="m has groups of 32, not 64"):
        Awq(64).pack("m", weight)
    with pytest.raises(ConfigError, match="order of columns"):
        Awq(32).pack("m", int4(*weight.tensors.values(), torch.randperm(64)))
    with pytest.raises(ConfigError, match="zero points up to 16"):
        zeros = torch.full((8, 2), 16, dtype=torch.uint8)
        Awq(32).pack("m", int4(weight.tensors["codes"], weight.tensors["scales"], zeros))
    with pytest.raises(ConfigError, match="12 x 64"):
        Awq(32).pack("m", random_weight(12, 64, 32))
