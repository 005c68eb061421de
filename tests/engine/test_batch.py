"""The arrays of a step: what the kernels rely on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.engine.batch import lay_out
from turbolm.engine.graph import graph_sizes
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.types import Request, Sequence

BLOCK = 8


def sequence(length: int, first_block: int) -> Sequence:
    made = Sequence(Request(f"r{first_block}", tuple(range(100, 100 + length))))
    made.blocks = list(range(first_block, first_block + -(-length // BLOCK) + 1))
    return made


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=6).map(
        lambda parts: sorted(parts, key=lambda part: part[1] + part[2] != 1)
    )
)
def test_every_token_has_its_position_and_its_own_slot(parts: list[tuple[int, int, int]]) -> None:
    items = []
    for number, (start, count, num_drafts) in enumerate(parts):
        made = sequence(start + count, 100 * number)
        items.append(ScheduledSequence(made, start, count, True, tuple(range(num_drafts))))
    step = Step(tuple(items), sum(item.num_tokens for item in items))
    arrays = lay_out(step, BLOCK, [[item.num_tokens - 1] for item in items])
    assert len(arrays.token_ids) == step.num_tokens == arrays.query_start[-1]
    assert len(set(arrays.slots.tolist())) == step.num_tokens
    for i, item in enumerate(items):
        first, last = arrays.query_start[i : i + 2]
        positions = arrays.positions[first:last]
        assert positions.tolist() == list(range(item.start, item.start + item.num_tokens))
        assert arrays.context_lens[i] == item.start + item.num_tokens
        blocks = np.array(item.sequence.blocks)
        assert (arrays.slots[first:last] == blocks[positions // BLOCK] * BLOCK + positions % BLOCK).all()
        expected = [*item.sequence.token_ids[item.start : item.start + item.num_new_tokens], *item.drafts]
        assert arrays.token_ids[first:last].tolist() == expected
        assert arrays.logit_rows[i] == last - 1
    decodes = [item.num_tokens for item in items[: arrays.num_decodes]]
    assert decodes == [1] * arrays.num_decodes
    assert [chunk[1] for chunk in arrays.chunks] == [item.num_tokens for item in items[arrays.num_decodes :]]
    assert all(arrays.query_start[arrays.num_decodes + i] == chunk[0] for i, chunk in enumerate(arrays.chunks))


def test_a_token_that_the_step_before_samples_is_named_by_its_row() -> None:
    known, unknown = sequence(9, 0), sequence(5, 10)
    items = (ScheduledSequence(known, 8, 1, True), ScheduledSequence(unknown, 5, 1, True, follows=True))
    arrays = lay_out(Step(items, 2), BLOCK, [[0], [0]], {known: 0, unknown: 3})
    assert arrays.token_ids.tolist() == [108, -4]
    assert arrays.positions.tolist() == [8, 5]


@given(st.integers(1, 2000))
def test_graphs_waste_few_rows(max_batch_size: int) -> None:
    sizes = graph_sizes(max_batch_size)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_batch_size
    for count in range(1, max_batch_size + 1):
        size = min(size for size in sizes if size >= count)
        assert size - count <= max(7, count // 4)
