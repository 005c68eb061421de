from __future__ import annotations

import os

import pytest
import torch

from turbolm.ops.triton.rounding import round_rows, scale_sums

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_rows_fill_the_range_of_codes(dtype: torch.dtype, largest: float) -> None:
    x = torch.randn(5, 136, generator=torch.Generator().manual_seed(0))[:, :120].half().to(DEVICE)
    x[3] = 0
    codes, scales = round_rows(x, dtype)
    assert codes.dtype == dtype and scales.shape == (5, 1)
    values = codes.float()
    assert (values.abs().amax(1).cpu() == torch.tensor([largest, largest, largest, 0, largest])).all()
    exact = x.float() / scales
    nearest = exact.round() if dtype is torch.int8 else exact.to(dtype).float()
    agrees = (values - nearest).abs() <= (dtype is torch.int8)  # ties
    if DEVICE.type == "cpu":  # Triton's interpreter loses the carry into the exponent of 8-bit floats
        agrees |= torch.frexp(nearest).mantissa.abs() == 0.5
    assert bool(agrees.all())


def test_sums_are_scaled_by_row_and_column() -> None:
    sums = torch.arange(-1500, 1500, dtype=torch.int32, device=DEVICE).view(2, 1500)
    rows, columns = torch.tensor([[0.5], [2.0]], device=DEVICE), torch.linspace(0, 1, 1500, device=DEVICE)
    bias = torch.ones(1500, dtype=torch.float16, device=DEVICE)
    out = torch.empty(2, 1500, dtype=torch.float16, device=DEVICE)
    scale_sums(sums, rows, columns, bias, out)
    torch.testing.assert_close(out, (sums * rows * columns + 1).half(), rtol=1e-3, atol=1e-3)
    floats = torch.empty(2, 1500, device=DEVICE)
    scale_sums(sums, rows, columns, None, floats)
    torch.testing.assert_close(floats, sums * rows * columns)
