"""Selecting, splitting and stacking rows: the same as doing it to the dequantized matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.errors import CheckpointError, ConfigError
from turbolm.quant import FORMATS, load_weight
from turbolm.quant.dense import dense

NAMES = list(FORMATS)


def make(random_blocks: Any, name: str, n: int, k: int, seed: int = 0) -> Any:
    if not FORMATS[name].is_dense:
        return random_blocks(name, n, k, seed)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
    return dense(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), n=st.integers(1, 9), blocks=st.integers(1, 3), data=st.data())
def test_select_rows(random_blocks: Any, name: str, n: int, blocks: int, data: Any) -> None:
    weight = make(random_blocks, name, n, 256 * blocks)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12)))
    selected = weight.format.select_rows(weight, rows)
    assert selected.shape == (len(rows), 256 * blocks)
    assert torch.equal(selected.dequantize(torch.float32), weight.dequantize(torch.float32)[rows])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), dim=st.integers(0, 1), size=st.integers(1, 4), part=st.integers(1, 3))
def test_shard(random_blocks: Any, name: str, dim: int, size: int, part: int) -> None:
    n, k = (size * part, 512) if dim == 0 else (3, size * part * 256)
    weight = make(random_blocks, name, n, k)
    shards = [weight.format.shard(weight, dim, rank, size) for rank in range(size)]
    assert all(shard.shape == ((n // size, k) if dim == 0 else (n, k // size)) for shard in shards)
    assert all(shard.tensors["data"].is_contiguous() for shard in shards)
    together = torch.cat([shard.dequantize(torch.float32) for shard in shards], dim=dim)
    assert torch.equal(together, weight.dequantize(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_concat(random_blocks: Any, name: str) -> None:
    first, second = make(random_blocks, name, 3, 256, 1), make(random_blocks, name, 2, 256, 2)
    both = first.format.concat([first, second])
    assert both.shape == (5, 256)
    parts = [first.dequantize(torch.float32), second.dequantize(torch.float32)]
    assert torch.equal(both.dequantize(torch.float32), torch.cat(parts))


def test_columns_split_only_between_blocks(random_blocks: Any) -> None:
    weight = random_blocks("q4_1", 4, 96)
    with pytest.raises(ConfigError, match=r"over 2 devices.*3 q4_1 blocks of 32.*divides 3"):
        weight.format.shard(weight, 1, 0, 2)


def test_rows_split_only_evenly(random_blocks: Any) -> None:
    weight = random_blocks("q8_0", 5, 32)
    with pytest.raises(ConfigError, match=r"4 devices.*5 rows.*divides 5"):
        weight.format.shard(weight, 0, 0, 4)


@pytest.mark.parametrize(
    ("shape", "data_shape", "dtype", "message"),
    [
        ((2, 48), (2, 30), "Q4_1", "rows of 48 elements are not whole q4_1 blocks of 32"),
        ((64,), (40,), "Q4_1", r"shape \[64\]; a matrix"),
        ((2, 2, 64), (2, 2, 40), "Q4_1", "a matrix"),
        ((2, 64), (2, 41), "Q4_1", r"\[2, 40\], got torch.uint8 \[2, 41\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    memory_source: Any, shape: tuple[int, ...], data_shape: tuple[int, ...], dtype: str, message: str
) -> None:
    source = memory_source({"m.weight": (torch.zeros(data_shape, dtype=torch.uint8), shape, dtype)})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weight(source, "m")
    assert "m.weight" in str(caught.value)
