from __future__ import annotations

import os

import pytest
import torch

from turbolm.ops.cuda.int4 import pack
from turbolm.ops.triton.unpack import unpack_int4
from turbolm.quant.int4 import int4

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
#: Triton's interpreter cuts bfloat16 off where a GPU rounds.
ROUNDING = {torch.float16: 0.0, torch.bfloat16: 2**-7 if DEVICE.type == "cpu" else 0.0}


@pytest.mark.parametrize("group", [32, 64, 128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_packed_comes_back(group: int, dtype: torch.dtype) -> None:
    n, k = 48, 512
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randn(n, k // group, generator=generator).to(torch.float16)
    zeros = torch.randint(0, 17, (n, k // group), dtype=torch.uint8, generator=generator)
    packed = pack(codes, scales, zeros)
    assert packed.shape == (n, k) and packed.group_size == min(group, 128)
    out = torch.full((2, n // 2, k + 8), float("nan"), dtype=dtype, device=DEVICE)[:, :, :k]
    unpack_int4(packed.units.to(DEVICE), out)
    expected = int4(codes, scales, zeros).dequantize(dtype)
    torch.testing.assert_close(out.reshape(n, k).cpu(), expected, rtol=ROUNDING[dtype], atol=0)


def test_part_of_a_matrix_is_rows_of_both_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=generator)
    scales = torch.rand(64, 1, generator=generator).to(torch.bfloat16)
    zeros = torch.full((64, 1), 8, dtype=torch.uint8)
    out = torch.empty(2, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    unpack_int4(pack(codes, scales, zeros).units[1:2].to(DEVICE), out)
    expected = int4(codes, scales, zeros).dequantize(torch.bfloat16).view(2, 4, 8, 128)[:, 1]
    torch.testing.assert_close(out.cpu(), expected, rtol=ROUNDING[torch.bfloat16], atol=0)
