"""What the GPU's backend makes of quantized weights, as far as a CPU can tell."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from turbolm.ops.cuda import int4 as layout
from turbolm.ops.cuda import weights
from turbolm.ops.cuda.ops import CudaOps
from turbolm.ops.cuda.weights import DenseLinear, EightBitLinear, Int4Linear
from turbolm.quant.fp8 import fp8
from turbolm.quant.int4 import int4
from turbolm.quant.rounding import round_weight
from turbolm.weights import Weight

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
OPS = CudaOps(DEVICE, torch.float16)


def quantized(n: int, k: int, group: int, columns: torch.Tensor | None = None) -> Weight:
    generator = torch.Generator().manual_seed(n + k + group)
    weight = round_weight(torch.randn(n, k, generator=generator) / k**0.5, "int4", group_size=group)
    tensors = weight.tensors
    return int4(tensors["codes"], tensors["scales"], tensors["zeros"], columns)


def inputs(t: int, k: int) -> torch.Tensor:
    return torch.randn(t, k, generator=torch.Generator().manual_seed(k)).half().to(DEVICE)


def expected(x: torch.Tensor, parts: list[Weight]) -> torch.Tensor:
    stacked = torch.cat([part.dequantize(torch.float16) for part in parts]).float()
    return F.linear(x.cpu().float(), stacked)


@pytest.mark.parametrize("slice_bytes", [1 << 20, 20_000])
def test_stacked_matrices_stay_packed_and_multiply(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_UNPACKED_BYTES", slice_bytes)
    parts = [quantized(n, 256, 64) for n in (48, 24, 24)]
    bias = torch.arange(96.0)
    linear = OPS.prepare_linear(parts, bias)
    assert isinstance(linear, Int4Linear)
    assert (linear.out_features, linear.in_features) == (96, 256)
    assert linear.num_bytes < 96 * 256 * 0.6
    x = inputs(5, 256)
    torch.testing.assert_close(linear.multiply(x).cpu().float(), expected(x, parts) + bias, rtol=4e-3, atol=4e-3)
    logits = torch.empty(5, 96, device=DEVICE)
    if DEVICE.type == "cuda":  # torch.mm has no out_dtype on CPUs
        linear.logits(x, logits)
        torch.testing.assert_close(logits.cpu(), expected(x, parts), rtol=4e-3, atol=4e-3)


def test_columns_in_an_order_of_their_own() -> None:
    columns = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    part = quantized(32, 128, 32, columns)
    linear = OPS.prepare_linear([part], None)
    assert isinstance(linear, Int4Linear)
    x = inputs(3, 128)
    torch.testing.assert_close(linear.multiply(x).cpu().float(), expected(x, [part]), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([(32, 128, 32), (32, 128, 64)], "groups of different sizes"),
        ([(24, 128, 32)], "24 rows of 128 columns"),
        ([(32, 192, 32)], "32 rows of 192 columns in groups of 32"),
        ([(32, 128, 16)], "in groups of 16"),
    ],
)
def test_what_no_kernel_takes_is_unpacked_and_said(
    parts: list[tuple[int, int, int]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = [quantized(*part) for part in parts]
    linear = OPS.prepare_linear(made, None)
    assert isinstance(linear, DenseLinear)
    torch.testing.assert_close(linear.weight.cpu(), torch.cat([part.dequantize(torch.float16) for part in made]))
    assert reason in caplog.text


def test_different_orders_of_columns_are_unpacked() -> None:
    orders = torch.arange(128), torch.arange(128).flip(0)
    made = [quantized(32, 128, 32, order) for order in orders]
    assert isinstance(OPS.prepare_linear(made, None), DenseLinear)


def test_mixed_formats_and_groups_of_8_bits_are_unpacked() -> None:
    mixed = [quantized(32, 128, 32), round_weight(torch.ones(32, 128), "int8")]
    grouped = [round_weight(torch.ones(32, 128), "int8", group_size=64)]
    for made in (mixed, grouped):
        linear = OPS.prepare_linear(made, None)
        assert isinstance(linear, DenseLinear) and linear.weight.dtype == torch.float16


@pytest.mark.parametrize("t", [3, 40, 70, 128])
def test_int8_weights_stay_and_multiply_activations_of_8_bits(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_INT8_SLICE", 64)
    multiply = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: multiply(a, b) if 16 < len(a) <= 64 else pytest.fail("rows"))
    parts = [round_weight(torch.randn(n, 256, generator=torch.Generator().manual_seed(n)), "int8") for n in (48, 16)]
    bias = torch.arange(64.0)
    linear = OPS.prepare_linear(parts, bias)
    assert isinstance(linear, EightBitLinear) and linear.num_bytes == 64 * 256
    x = inputs(t, 256)
    y = expected(x, parts) + bias
    error = (linear.multiply(x).cpu().float() - y).abs().max() / y.abs().max()
    assert error < 0.01
    logits = torch.empty(t, 64, device=DEVICE)
    linear.logits(x, logits)
    assert (logits.cpu() + bias - y).abs().max() / y.abs().max() < 0.01


def test_fp8_weights_stay_where_a_row_has_one_scale() -> None:
    whole = fp8(torch.ones(32, 128).to(torch.float8_e4m3fn), torch.tensor([[0.5]]))
    rows = round_weight(torch.ones(16, 128), "fp8")
    linear = OPS.prepare_linear([whole, rows], None)
    assert isinstance(linear, EightBitLinear)
    assert linear.matrix.codes.dtype == torch.float8_e4m3fn and linear.matrix.codes.shape == (48, 128)
    torch.testing.assert_close(linear.matrix.scales.cpu(), torch.tensor([0.5] * 32 + [1 / 448] * 16))
    blocks = fp8(torch.ones(256, 256).to(torch.float8_e4m3fn), torch.ones(2, 2))
    assert isinstance(OPS.prepare_linear([blocks], None), DenseLinear)


def test_scales_keep_what_float16_and_bfloat16_hold() -> None:
    scales = torch.tensor([[1.0009765625], [6e-8], [-3.1], [65504.0]]).half().repeat(8, 1)
    codes, zeros = torch.zeros(32, 64, dtype=torch.uint8), torch.full((32, 1), 16, dtype=torch.uint8)
    words = layout.pack(codes, scales, zeros).units[0, 0, 1024:].view(torch.int32)
    assert (words & 31 == 16).all()
    rows = (words & ~31).view(torch.float32).view(8, 2)
    torch.testing.assert_close(rows, scales.float().view(2, 2, 8)[:, 0].T.contiguous(), rtol=0, atol=0)
