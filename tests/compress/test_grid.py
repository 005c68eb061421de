from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.compress.grid import Grid, full_range, nearest_values, round_matrix, search_grid

DTYPES = [torch.float16, torch.bfloat16]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), scale=st.sampled_from([1e-7, 1e-2, 1.0, 300.0]), shift=st.floats(-3, 3),
    symmetric=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_rounding_is_off_by_half_a_step_at_most(seed, scale, shift, symmetric, dtype):
    matrix = (torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    grid = Grid(32, symmetric, dtype)
    scales, zeros = full_range(matrix.view(3, 2, 32), grid)
    assert torch.equal(scales, scales.to(dtype).float())
    assert ((zeros == 8) if symmetric else (zeros >= 1) & (zeros <= 15)).all()
    rounded = round_matrix(matrix, scales, zeros).weights([3], dtype)[0].dequantize(torch.float32)
    # A step more where the zero point was moved to 1, a half more at the end of a symmetric range.
    error = (rounded - matrix).abs().view(3, 2, 32).amax(2)
    assert (error <= 1.1 * scales + 8 * 2.0**-24).all()  # scales are multiples of float16's 2^-24, 15 make the range


def test_groups_of_zeros_stay_zero():
    weight = round_matrix(torch.zeros(2, 32), *full_range(torch.zeros(2, 1, 32), Grid(32, False, torch.float16)))
    assert not weight.weights([2], torch.float16)[0].dequantize(torch.float32).any()


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_search_lowers_the_error_of_every_group(with_gram, group_size):
    torch.manual_seed(0)
    matrix = torch.randn(40, 128)
    matrix[::3, ::17] *= 6  # what clipping is good for
    x = torch.randn(300, 128) * torch.rand(128)
    gram = x.T @ x / 300 if with_gram else None
    grid = Grid(group_size, False, torch.float16)
    groups = matrix.view(40, -1, grid.width(128))

    def errors(scales, zeros):
        delta = (nearest_values(groups, scales[..., None], zeros[..., None]) - groups).view(40, 128)
        parts = delta.view(groups.shape)
        if gram is None:
            return parts.square().sum(2)
        g = grid.width(128)
        blocks = [gram[i : i + g, i : i + g] for i in range(0, 128, g)]
        return torch.stack([((parts[:, i] @ block) * parts[:, i]).sum(1) for i, block in enumerate(blocks)], 1)

    plain, found = errors(*full_range(groups, grid)), errors(*search_grid(matrix, gram, grid))
    assert (found <= plain * 1.0001).all()
    assert found.sum() < 0.98 * plain.sum()


def test_stacked_matrices_are_split_by_rows():
    torch.manual_seed(0)
    matrix = torch.randn(5, 64)
    rounded = round_matrix(matrix, *full_range(matrix.view(5, 2, 32), Grid(32, False, torch.float16)))
    first, second = rounded.weights([2, 3], torch.float16)
    whole = rounded.weights([5], torch.float16)[0].dequantize(torch.float32)
    assert torch.equal(torch.cat([first.dequantize(torch.float32), second.dequantize(torch.float32)]), whole)
