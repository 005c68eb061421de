"""Rounding to the nearest: its error bounds, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.errors import CheckpointError, ConfigError
from turbolm.quant import FORMATS
from turbolm.quant.dense import dense
from turbolm.quant.int4 import is_symmetric
from turbolm.quant.rounding import Rounding, round_weight


def random_matrix(n: int, k: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=generator) * torch.logspace(-3, 1, n).unsqueeze(1)
    return matrix * (1 + 5 * (torch.rand(n, k, generator=generator) > 0.98))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_int4_is_within_a_step(n: int, groups: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    matrix = random_matrix(n, groups * group).to(dtype)
    weight = round_weight(matrix, "int4", group_size=group, symmetric=symmetric)
    assert weight.tensors["scales"].shape == (n, groups)
    assert not symmetric or is_symmetric(weight)
    parts = matrix.float().view(n, groups, group)
    step = parts.abs().amax(2) * 2 / 15 if symmetric else (parts.amax(2).clamp(min=0) - parts.amin(2).clamp(max=0)) / 15
    distance = (weight.dequantize(torch.float32) - matrix.float()).view(n, groups, group).abs().amax(2)
    assert (distance <= 1.02 * step).all()  # half a step; a whole one where the zero point is rounded at an end


def test_int8_is_within_half_a_step() -> None:
    matrix = random_matrix(20, 96)
    for group, size in ((96, None), (96, -1), (32, 32)):
        weight = round_weight(matrix, "int8", group_size=size)
        assert weight.tensors["scales"].shape == (20, 96 // group)
        step = matrix.view(20, -1, group).abs().amax(2, keepdim=True) / 127
        distance = (weight.dequantize(torch.float32) - matrix).view(20, -1, group).abs()
        assert (distance <= 0.501 * step).all()


def test_fp8_keeps_four_bits_of_each_weight() -> None:
    matrix = random_matrix(20, 96)
    weight = round_weight(matrix, "fp8")
    assert weight.tensors["scales"].shape == (20, 1)
    smallest_normal = weight.tensors["scales"] * 2.0**-6
    bound = torch.maximum(matrix.abs(), smallest_normal) / 16
    assert ((weight.dequantize(torch.float32) - matrix).abs() <= 1.001 * bound).all()


@pytest.mark.parametrize("target", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("matrix", [torch.zeros(4, 64), torch.full((4, 64), 1e-12), torch.full((4, 64), 0.5)])
def test_constant_rows(target: str, matrix: Tensor) -> None:
    values = round_weight(matrix, target).dequantize(torch.float32)  # type: ignore[arg-type]
    assert torch.allclose(values, matrix, rtol=0.04, atol=1e-6)


def test_many_rows_are_rounded_as_single_ones() -> None:
    matrix = random_matrix(3, 1 << 21)
    whole = round_weight(matrix, "int8")  # two rows at a time
    assert torch.equal(whole.tensors["codes"][2:], round_weight(matrix[2:], "int8").tensors["codes"])


@pytest.mark.parametrize(("k", "group"), [(256, 128), (576, 64), (96, 32), (50, 50)])
def test_the_default_group_is_the_largest_that_fits(k: int, group: int) -> None:
    assert round_weight(torch.randn(2, k), "int4").tensors["scales"].shape == (2, k // group)


@pytest.mark.parametrize(("target", "size"), [("int4", 48), ("int4", 0), ("int8", 48), ("fp8", 32), ("int4", 1)])
def test_groups_that_do_not_fit(target: str, size: int) -> None:
    with pytest.raises(ConfigError, match=target):
        round_weight(torch.randn(2, 128), target, group_size=size)  # type: ignore[arg-type]


def test_a_checkpoints_matrices() -> None:
    rounding = Rounding("int4", "int8", frozenset({"head"}), group_size=32)
    matrix = dense(torch.randn(4, 64).bfloat16())
    assert rounding.round(matrix, "layer").tensors["scales"].shape == (4, 2)
    assert rounding.round(matrix, "head").format.name == "int8"
    assert rounding.round(dense(torch.randn(4, 50)), "layer").tensors["scales"].shape == (4, 1)
    assert Rounding("fp8", None, frozenset({"head"}), group_size=32).round(matrix, "head") is matrix
    assert Rounding("fp8", None, frozenset(), group_size=32).round(matrix, "layer").format.name == "fp8"
    blocks = FORMATS["q8_0"].pack(torch.zeros(4, 68, dtype=torch.uint8), (4, 64))
    with pytest.raises(ConfigError, match=r"layer\.weight is stored as q8_0.*'int4'"):
        rounding.round(blocks, "layer")
    for number in (torch.nan, torch.inf):
        with pytest.raises(CheckpointError, match=r"layer\.weight holds numbers that are not finite"):
            rounding.round(dense(torch.full((2, 64), number)), "layer")
