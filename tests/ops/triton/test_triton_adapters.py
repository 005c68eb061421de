"""The kernels of LoRA adapters against plain torch."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.ops import AdapterWeights
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.triton.adapters import add_adapters

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, where a GPU is silent

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
REFERENCE = ReferenceOps(DEVICE, torch.float32)
ENDS = st.sampled_from([(24,), (70, 110), (64, 96, 128)])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weights(ends: tuple[int, ...], width: int, rank: int, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    """Three places: a full rank, a lower one, none."""
    a = random(3, len(ends) * rank, width, seed=1)
    b = random(3, rank, ends[-1], seed=2)
    a[1].view(len(ends), rank, width)[:, 5:] = 0
    b[1, 5:] = 0
    ranks = torch.tensor([rank, 5, 0], dtype=torch.int32, device=DEVICE)
    return AdapterWeights(a.to(dtype), b.to(dtype), ranks, ends)


@settings(max_examples=6, deadline=None)
@given(
    ends=ENDS, width=st.sampled_from([32, 72]), rank=st.sampled_from([16, 48]),
    places=st.lists(st.integers(-1, 2), min_size=1, max_size=18), num_sums=st.sampled_from([0, 3]),
)  # fmt: skip
def test_adds_what_the_reference_adds(
    ends: tuple[int, ...], width: int, rank: int, places: list[int], num_sums: int
) -> None:
    own, t = weights(ends, width, rank), len(places)
    x, places_t = random(t, width, seed=3), torch.tensor(places, dtype=torch.int32, device=DEVICE)
    y = random(num_sums, t, ends[-1], seed=4) if num_sums else random(t, ends[-1], seed=4)
    expected = REFERENCE.add_adapters(y.sum(0) if num_sums else y.clone(), x, own, places_t)
    out = torch.empty_like(expected) if num_sums else y
    add_adapters(y, x, own, places_t, out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


def test_a_row_is_the_same_in_any_company_even_beside_an_adapter_of_infinities() -> None:
    own = weights((24,), 40, 16)
    own.a[0, 0, 0] = float("inf")
    x, y = random(20, 40, seed=3), random(20, 24, seed=4)
    together, alone = y.clone(), y.clone()
    add_adapters(y, x, own, torch.tensor([0, 1] * 10, dtype=torch.int32, device=DEVICE), together)
    add_adapters(y, x, own, torch.tensor([-1, 1] * 10, dtype=torch.int32, device=DEVICE), alone)
    assert bool(together[1::2].isfinite().all())
    assert torch.equal(together[1::2], alone[1::2])
    assert torch.equal(alone[0::2], y[0::2])


def test_sixteen_bits_and_many_rows() -> None:
    own = weights((64, 96, 128), 64, 16, torch.float16)
    x, places = random(150, 64, seed=3).half(), torch.arange(150, dtype=torch.int32, device=DEVICE) // 40 - 1
    y = random(150, 128, seed=4).half()
    exact = AdapterWeights(own.a.float(), own.b.float(), own.ranks, own.ends)
    expected = REFERENCE.add_adapters(y.float(), x.float(), exact, places)
    add_adapters(y, x, own, places, y)
    torch.testing.assert_close(y.float(), expected, rtol=4e-3, atol=0.1)
