from __future__ import annotations

import pytest
import torch

from turbolm.compress.gptq import gptq
from turbolm.compress.grid import Grid, round_matrix, search_grid
from turbolm.compress.statistics import relative_error


def correlated(num_tokens, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(num_tokens, k, generator=generator) @ mixing * (0.2 + torch.rand(k, generator=generator) * 3)


@pytest.mark.parametrize("order", ["static", "group", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_outputs_are_closer_than_by_rounding_to_the_nearest(order, symmetric, group_size):
    x, held_out = correlated(800, 160).split(600)
    matrix = torch.randn(48, 160, generator=torch.Generator().manual_seed(5))
    gram, grid = x.T @ x / 600, Grid(group_size, symmetric, torch.float16)
    rounded = gptq(matrix, gram, grid, order, 0.01)
    assert rounded is not None
    weight = rounded.weights([48], torch.float16)[0]
    assert ("columns" in weight.tensors) == (order == "group")
    plain = round_matrix(matrix, *search_grid(matrix, gram, grid)).weights([48], torch.float16)[0]
    errors = [relative_error(matrix, w.dequantize(torch.float32), gram) for w in (weight, plain)]
    assert errors[0] < 0.8 * errors[1]
    gram = held_out.T @ held_out / 200
    errors = [relative_error(matrix, w.dequantize(torch.float32), gram) for w in (weight, plain)]
    assert errors[0] < 0.85 * errors[1]


def test_exact_weights_stay_exact():
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0::32], codes[:, 1::32] = 0, 15  # so that each group's range is known
    matrix = (codes - 7) * 0.25
    rounded = gptq(matrix, torch.eye(64), Grid(32, False, torch.float16), "static", 0.01)
    assert torch.equal(rounded.weights([8], torch.float16)[0].dequantize(torch.float32), matrix)


def test_dead_and_repeated_channels():
    x = correlated(300, 64)
    x[:, 7] = 0
    x[:, 9] = x[:, 8]  # a singular gram
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    gram, grid = x.T @ x / 300, Grid(32, False, torch.float16)
    rounded = gptq(matrix, gram, grid, "static", 0.01)
    result = rounded.weights([16], torch.float16)[0].dequantize(torch.float32)
    assert (result - matrix).abs()[:, 7].max() < 0.3  # rounded by itself, not given up
    assert relative_error(matrix, result, gram) < 0.01


def test_too_few_tokens_still_give_weights():
    x = correlated(5, 64)
    rounded = gptq(torch.randn(4, 64), x.T @ x / 5, Grid(32, False, torch.float16), "static", 0.01)
    assert torch.isfinite(rounded.scales).all()


def test_no_factor():
    gram = torch.full((32, 32), float("nan"))
    assert gptq(torch.randn(4, 32), gram, Grid(32, False, torch.float16), "none", 0.01) is None
