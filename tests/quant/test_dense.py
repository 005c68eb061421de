"""Dense matrices."""

from __future__ import annotations

import pytest
import torch

from turbolm.quant.dense import dense


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_a_matrix_in_its_own_dtype_is_not_copied(dtype: torch.dtype, name: str) -> None:
    matrix = torch.randn(4, 6).to(dtype)
    weight = dense(matrix)
    assert (weight.format.name, weight.format.is_dense, weight.shape) == (name, True, (4, 6))
    assert weight.num_bytes == 24 * dtype.itemsize
    assert weight.dequantize(dtype).data_ptr() == matrix.data_ptr()


def test_conversion_rounds() -> None:
    matrix = torch.randn(4, 6)
    assert torch.equal(dense(matrix).dequantize(torch.bfloat16), matrix.to(torch.bfloat16))


def test_integers_are_no_dense_format() -> None:
    with pytest.raises(TypeError, match="int32"):
        dense(torch.zeros(2, 2, dtype=torch.int32))
