"""The kernels for penalties, biases and bans against the reference."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.ops import adjustments as reference
from turbolm.ops.adjustments import PROMPT, Adjustments
from turbolm.ops.triton import adjustments as kernels

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
SLOTS = 3


@st.composite
def steps(draw: st.DrawFn, vocab_size: int) -> tuple[Adjustments, torch.Tensor]:
    """Adjustments of some rows, and what an earlier step sampled."""
    num_rows = draw(st.integers(1, 4))
    previous = draw(st.lists(st.integers(-1, vocab_size - 1), min_size=1, max_size=3))
    token = st.integers(0, vocab_size - 1)
    follow = st.integers(-len(previous), -1)
    counted = draw(st.lists(st.tuples(st.integers(0, SLOTS - 1), token | follow, st.sampled_from([1, 1, PROMPT]))))
    number = st.floats(-2, 2, width=32)
    by_row = [
        (draw(st.integers(-1, SLOTS - 1)), draw(st.floats(0.5, 2, width=32)), draw(number), draw(number))
        for _ in range(num_rows)
    ]
    num_drafts = draw(st.sampled_from([0, 2]))
    drafts = [[draw(st.integers(-1, vocab_size - 1)) for _ in range(num_drafts)] for _ in by_row]
    value = st.just(-torch.inf) | st.floats(-100, 100, width=32)
    places = draw(st.lists(st.tuples(st.integers(0, num_rows - 1), token), unique=True, max_size=5))
    entries = [(row, t, draw(value), draw(st.integers(-1, len(previous) - 1)), draw(token)) for row, t in places]

    def column(values: list[object], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    slots, repetition, presence, frequency = ([row[i] for row in by_row] for i in range(4))
    rows, tokens, values, sources, wanted = ([entry[i] for entry in entries] for i in range(5))
    numbers = (column(values, torch.float32) for values in (repetition, presence, frequency))
    return Adjustments(
        *(column([entry[i] for entry in counted]) for i in range(3)), column(slots),
        column(drafts).view(num_rows, num_drafts), *numbers, column(rows), column(tokens),
        column(values, torch.float32), column(sources), column(wanted),
    ), column(previous)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([7, 40]))
def test_kernels_adjust_as_the_reference_does(data: st.DataObject, vocab_size: int) -> None:
    adjustments, previous = data.draw(steps(vocab_size))
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (SLOTS, vocab_size), dtype=torch.int32, generator=generator).to(DEVICE)
    logits = torch.randn(len(adjustments.slots), vocab_size + 3, generator=generator).to(DEVICE)
    expected_counts, expected = counts.clone(), logits.clone()
    reference.adjust(expected[:, :vocab_size], expected_counts, adjustments, previous)
    kernels.adjust(logits[:, :vocab_size], counts, adjustments, previous)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits == -torch.inf, expected == -torch.inf)


@pytest.mark.parametrize("adjust", [reference.adjust, kernels.adjust], ids=["reference", "kernels"])
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 40))
def test_parts_of_a_vocabulary_are_adjusted_as_the_whole(adjust: Any, data: st.DataObject, cut: int) -> None:
    adjustments, previous = data.draw(steps(40))
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (SLOTS, 40), dtype=torch.int32, generator=generator).to(DEVICE)
    logits = torch.randn(len(adjustments.slots), 40, generator=generator).to(DEVICE)
    parts = [(logits[:, own].clone(), counts[:, own].clone(), own.start) for own in (slice(0, cut), slice(cut, 40))]
    reference.adjust(logits, counts, adjustments, previous)
    for own_logits, own_counts, first in parts:
        if own_logits.shape[1]:
            adjust(own_logits, own_counts, adjustments, previous, first)
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([part[1] for part in parts], 1), counts)
