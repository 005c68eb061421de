"""int4, int8 and fp8 matrices on the native kernels: the rows that these hold, and products."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from turbolm import fallbacks
from turbolm.ops.cpu.matmul import PackedLinear
from turbolm.ops.cpu.ops import CpuOps
from turbolm.quant.dense import dense
from turbolm.quant.fp8 import fp8
from turbolm.quant.int4 import int4
from turbolm.quant.int8 import int8
from turbolm.quant.rounding import round_weight
from turbolm.weights import Weight

OPS = CpuOps(threads=1)


def random_int4(n: int, k: int, group: int, *, symmetric: bool, columns: Tensor | None = None) -> Weight:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    zeros = torch.full((n, k // group), 8) if symmetric else torch.randint(0, 17, (n, k // group))
    scales = torch.rand(n, k // group).half() * 0.1
    return int4(codes, scales, zeros.to(torch.uint8), columns)


def held(weights: list[Weight], ops: CpuOps = OPS) -> tuple[Tensor, list[int]]:
    """The rows [n, k] that the kernels hold, and the bytes of each part."""
    linear = ops.prepare_linear(weights, None)
    assert isinstance(linear, PackedLinear)
    rows = [
        ops.embedding(torch.arange(part.n, dtype=torch.int32), PackedLinear(linear.in_features, [part], None)).clone()
        for part in linear.parts
    ]
    return torch.cat(rows), [part.data.numel() for part in linear.parts]


def values(weight: Weight) -> Tensor:
    return weight.dequantize(torch.float32)


@pytest.mark.parametrize("group", [32, 64, 256])
def test_symmetric_int4_is_held_exactly_in_q4_0(group: int) -> None:
    weight = random_int4(20, 256, group, symmetric=True)
    rows, sizes = held([weight])
    assert torch.equal(rows, values(weight))
    assert sizes == [32 * 256 * 18 // 32]


@pytest.mark.parametrize("group", [32, 64, 256])
def test_int4_is_held_in_q4_1_but_for_the_minimums_rounding(group: int) -> None:
    weight = random_int4(20, 256, group, symmetric=False)
    rows, sizes = held([weight])
    minimum = weight.tensors["scales"].float() * weight.tensors["zeros"].float()
    bound = minimum.repeat_interleave(group, 1) * 2.0**-11 + 1e-7
    assert ((rows - values(weight)).abs() <= bound).all()
    assert sizes == [32 * 256 * 20 // 32]


@pytest.mark.parametrize("group", [32, 128, 256])
def test_int8_is_held_in_q8_0_with_float16_scales(group: int) -> None:
    weight = int8(torch.randint(-128, 128, (20, 256), dtype=torch.int8), torch.rand(20, 256 // group) * 0.01 + 1e-3)
    rows, sizes = held([weight])
    assert ((rows - values(weight)).abs() <= values(weight).abs() * 2.0**-11).all()
    assert sizes == [32 * 256 * 34 // 32]


@pytest.mark.parametrize("scale_shape", [(1, 1), (200, 1), (2, 2)])
def test_fp8_is_held_in_q8_0(scale_shape: tuple[int, int]) -> None:
    weight = fp8(torch.randn(200, 256).to(torch.float8_e4m3fn), torch.rand(scale_shape))
    rows, sizes = held([weight])
    largest = values(weight).view(200, -1, 32).abs().amax(2).repeat_interleave(32, 1)
    assert ((rows - values(weight)).abs() <= largest / 127 * 0.55).all()
    assert sizes == [208 * 256 * 34 // 32]


@pytest.mark.parametrize("weight", [
    random_int4(20, 256, 64, symmetric=False, columns=torch.randperm(256)),
    random_int4(20, 96, 16, symmetric=True),
    random_int4(20, 48, 48, symmetric=False),
    int8(torch.randint(-128, 128, (20, 48), dtype=torch.int8), torch.rand(20, 1)),
    fp8(torch.randn(20, 48).to(torch.float8_e4m3fn), torch.rand(20, 1)),
])  # fmt: skip
def test_what_has_no_blocks_is_unpacked_to_float16(weight: Weight) -> None:
    rows, sizes = held([weight])
    assert torch.equal(rows, weight.dequantize(torch.float16).float())
    assert sizes == [32 * weight.shape[1] * 2]


def test_activation_order_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallbacks, "_told", set())
    weight = random_int4(16, 64, 32, symmetric=True, columns=torch.randperm(64))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            held([weight])
    assert [record.message for record in caplog.records if "activation order" in record.message] == [
        "columns in activation order have no native kernels: such weights are unpacked to 16 bits"
    ]


def test_stacked_matrices_of_different_formats() -> None:
    weights = [
        random_int4(32, 64, 32, symmetric=True),
        random_int4(16, 64, 64, symmetric=True),
        random_int4(16, 64, 64, symmetric=False),
        int8(torch.randint(-128, 128, (24, 64), dtype=torch.int8), torch.rand(24, 1)),
        dense(torch.randn(8, 64).bfloat16()),
    ]
    rows, sizes = held(weights)
    assert len(sizes) == 4  # both symmetric ones share a part
    assert torch.allclose(rows, torch.cat([values(weight) for weight in weights]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["int4", "int8", "fp8"])
def test_products(target: str) -> None:
    matrix, x = torch.randn(40, 256), torch.randn(5, 256)
    weight = round_weight(matrix, target, group_size=None if target == "fp8" else 64)  # type: ignore[arg-type]
    bias = torch.randn(40)
    y = OPS.linear(x, OPS.prepare_linear([weight], bias))
    expected = x @ values(weight).T + bias
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("target", ["int4", "int8", "fp8"])
def test_unpacked_weights_are_exact(target: str) -> None:
    weight = round_weight(torch.randn(20, 64), target)  # type: ignore[arg-type]
    assert torch.equal(held([weight], CpuOps(threads=1, unpack=True))[0], values(weight))
