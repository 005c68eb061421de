"""Native sampling against the plain-torch definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.ops import sampling as reference
from turbolm.ops.cpu.library import Team
from turbolm.ops.cpu.sampling import argmax, sample

TEAM = Team(2)


def columns(rows: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> tuple[Tensor, ...]:
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int64),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        uniform,
    )


def logits_of(rows: int, vocabulary: int, spread: float, seed: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([2, 17, 1024, 5000, 49152]),
    spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_same_draws_as_the_reference(
    rows: int, vocabulary: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = logits_of(rows, vocabulary, spread, seed)
    *parameters, uniform = columns(rows, temperature, top_k, top_p, min_p, seed)
    tokens = sample(TEAM, logits, *parameters, uniform)
    # Tokens follow each other as the uniform number grows; rounding may move their borders a little.
    low, high = (reference.sample(logits, *parameters, (uniform + e).clamp(0, 1 - 2**-53)) for e in (-1e-6, 1e-6))
    assert bool(((low <= tokens) & (tokens <= high)).all())


def test_filters_keep_what_they_say() -> None:
    """Drawing often meets exactly the kept tokens."""
    probs = torch.tensor([0.05, 0.4, 0.2, 0.05, 0.3])
    logits = probs.log().repeat(400, 1)

    def drawn(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
        return set(sample(TEAM, logits, *columns(400, 1.0, top_k, top_p, min_p, 1)).tolist())

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 4}
    assert drawn(top_p=0.75) == {1, 2, 4}
    assert drawn(top_p=0.69) == {1, 4}
    assert drawn(min_p=0.45) == {1, 2, 4}
    assert drawn(top_k=3, top_p=0.5) == {1, 4}  # 0.4 / 0.9 is less than half of what top_k left


def test_frequencies_follow_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    tokens = sample(TEAM, probs.log().repeat(20000, 1), *columns(20000, 1.0, 0, 1.0, 0.0, 3))
    torch.testing.assert_close(torch.bincount(tokens) / 20000, probs, atol=0.015, rtol=0)


def test_row_does_not_depend_on_the_batch() -> None:
    logits = logits_of(6, 3000, 2.0, 0)
    parameters = columns(6, 0.8, 50, 0.9, 0.0, 5)
    together = sample(TEAM, logits, *parameters)
    alone = [sample(TEAM, logits[i : i + 1], *(p[i : i + 1] for p in parameters)) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 1023, 1024, 1025, 49152])
def test_argmax(vocabulary: int) -> None:
    logits = logits_of(7, vocabulary, 1.0, vocabulary)
    logits[1, vocabulary // 2 :] = logits[1].max() + 1  # the first of equals
    logits[2, : vocabulary // 2] = -torch.inf
    expected = logits.argmax(-1)
    expected[1] = vocabulary // 2
    assert torch.equal(argmax(TEAM, logits), expected)


def test_rows_without_a_distribution() -> None:
    logits = logits_of(3, 2000, 1.0, 0)
    logits[0, 1234] = torch.nan
    logits[1] = -torch.inf
    assert argmax(TEAM, logits).tolist()[:2] == [-1, -1]
    assert sample(TEAM, logits, *columns(3, 1.0, 0, 0.9, 0.0, 0)).tolist()[:2] == [-1, -1]


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(200, 50)
    logits[:, 10:] = -torch.inf
    tokens = sample(TEAM, logits, *columns(200, 5.0, 0, 1.0, 0.0, 1))
    assert set(tokens.tolist()) == set(range(10))
    edge = columns(1, 1.0, 0, 1.0, 0.0, 1)
    edge[4].fill_(1.0 - 2.0**-53)
    assert sample(TEAM, logits[:1], *edge).item() == 9
    edge[4].fill_(0.0)
    assert sample(TEAM, logits[:1].flip(1), *edge).item() == 40
