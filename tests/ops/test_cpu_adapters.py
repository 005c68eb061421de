"""The native kernels of LoRA adapters against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.ops import AdapterWeights
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.reference import ReferenceOps

REFERENCE = ReferenceOps(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def backends() -> list[CpuOps]:
    """One thread, and more than there are rows."""
    return [CpuOps(threads=1), CpuOps(threads=3)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(ends: tuple[int, ...], width: int, rank: int) -> AdapterWeights:
    """Three places: a full rank, one that fills no group of rows, none."""
    a, b = random(3, len(ends) * rank, width, seed=1), random(3, rank, ends[-1], seed=2)
    a[1].view(len(ends), rank, width)[:, 5:] = 0
    b[1, 5:] = 0
    return AdapterWeights(a, b, torch.tensor([rank, 5, 0], dtype=torch.int32), ends)


@settings(max_examples=20, deadline=None)
@given(
    ends=st.sampled_from([(37,), (50, 103), (64, 96, 128), (16, 17, 99)]), width=st.sampled_from([16, 64, 75]),
    rank=st.sampled_from([16, 48]), places=st.lists(st.integers(-1, 2), min_size=1, max_size=40),
)  # fmt: skip
def test_adds_what_the_reference_adds_to_a_row_the_same_in_any_company(
    backends: list[CpuOps], ends: tuple[int, ...], width: int, rank: int, places: list[int]
) -> None:
    own, t = weights(ends, width, rank), len(places)
    x, y, places_t = random(t, width, seed=3), random(t, ends[-1], seed=4), torch.tensor(places, dtype=torch.int32)
    expected = REFERENCE.add_adapters(y.clone(), x, own, places_t)
    found = [ops.add_adapters(y.clone(), x, own, places_t) for ops in backends]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], found[1])
    alone = [backends[1].add_adapters(y[i : i + 1].clone(), x[i : i + 1], own, places_t[i : i + 1]) for i in range(t)]
    assert torch.equal(torch.cat(alone), found[0])
    untouched = (places_t < 0) | (places_t == 2)
    assert torch.equal(found[0][untouched], y[untouched])
