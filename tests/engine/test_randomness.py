"""The draws' uniform numbers: reproducible, spread out, and the same one by one and together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from turbolm.engine.randomness import stream_key, uniform, uniform_at
from turbolm.types import Request, SamplingParams


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 31)), min_size=1, max_size=20))
def test_one_by_one_equals_together(draws: list[tuple[int, int]]) -> None:
    keys, positions = (list(column) for column in zip(*draws, strict=True))
    together = uniform(np.array(keys, np.uint64), np.array(positions, np.int64))
    assert together.tolist() == [uniform_at(*draw) for draw in draws]
    assert ((together >= 0) & (together < 1)).all()


def test_numbers_are_uniform_along_a_stream_and_across_streams() -> None:
    keys = [stream_key(Request("r", (1,), SamplingParams(seed=seed))) for seed in range(200)]
    grid = uniform(np.repeat(np.array(keys, np.uint64), 200), np.tile(np.arange(200), 200)).reshape(200, 200)
    for numbers in (grid[:, 0], grid[0], grid[:, 77]):
        assert abs(numbers.mean() - 0.5) < 0.08
    counts, _ = np.histogram(grid, bins=100, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 160  # chi-square with 99 degrees of freedom: 1 in 10,000
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


def test_a_stream_belongs_to_seed_and_index() -> None:
    one = Request("one", (1,), SamplingParams(seed=5))
    assert stream_key(one) == stream_key(replace(one, id="two"))
    assert stream_key(one) != stream_key(replace(one, index=1))
    free = Request("one", (1,))
    assert stream_key(free) == stream_key(free) != stream_key(replace(free, id="two"))
