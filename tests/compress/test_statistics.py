from __future__ import annotations

import torch

from turbolm.compress.statistics import Statistics, relative_error


def test_broken_inputs_are_left_out_and_counted():
    x = torch.randn(20, 8)
    x[3, 2], x[7, 0] = float("nan"), float("inf")
    statistics = Statistics.empty(8, 20, torch.device("cpu"))
    statistics.add(x[:10])
    statistics.add(x[10:])
    statistics.finish()
    good = x[torch.isfinite(x).all(1)]
    assert (statistics.num_tokens, statistics.num_dropped) == (18, 2)
    torch.testing.assert_close(statistics.gram, good.T @ good / 18)


def test_nothing_came():
    statistics = Statistics.empty(8, 100, torch.device("cpu"))
    statistics.add(torch.full((4, 8), float("nan")))
    statistics.finish()
    assert statistics.num_tokens == 0
    assert not statistics.gram.any()


def test_dead_channels_are_counted():
    statistics = Statistics.empty(8, 10, torch.device("cpu"))
    x = torch.randn(10, 8)
    x[:, [1, 5]] = 0
    statistics.add(x)
    assert statistics.num_dead == 2


def test_few_rows_of_much_data_are_kept():
    statistics = Statistics.empty(4, 100_000, torch.device("cpu"))
    for _ in range(25):
        statistics.add(torch.randn(4000, 4))
    assert 400 <= statistics.sampled().shape[0] <= 600


def test_relative_error_is_that_of_the_outputs():
    x, weight = torch.randn(50, 16), torch.randn(6, 16)
    rounded = weight + 0.1 * torch.randn(6, 16)
    direct = ((weight - rounded) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert abs(relative_error(weight, rounded, x.T @ x / 50) / float(direct) - 1) < 1e-4
    assert relative_error(torch.zeros(2, 16), torch.zeros(2, 16), x.T @ x) == 0
