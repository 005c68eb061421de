"""Rows of running sequences follow what the scheduler does to them."""

from __future__ import annotations

from turbolm.engine.sequence_table import SequenceTable
from turbolm.engine.step import ScheduledSequence
from turbolm.types import Request, SamplingParams, Sequence, SequenceState


def item(sequence: Sequence) -> ScheduledSequence:
    return ScheduledSequence(sequence, 0, 1, True)


def made(name: str, **params: object) -> Sequence:
    return Sequence(Request(name, (1, 2, 3), SamplingParams.of(None, **params)))


def test_blocks_are_followed_as_they_grow_and_after_a_preemption() -> None:
    table = SequenceTable(2, 8)
    one = made("one")
    one.blocks = [5, 6]
    (row,) = table.rows((item(one),))
    assert table.block_tables[row, :2].tolist() == [5, 6]
    one.blocks.append(9)
    assert table.rows((item(one),)).tolist() == [row]
    assert table.block_tables[row, :3].tolist() == [5, 6, 9]
    one.blocks = [1, 2, 3]  # as many as before
    table.rows((item(one),))
    assert table.block_tables[row, :3].tolist() == [1, 2, 3]


def test_rows_of_finished_sequences_are_given_away_and_others_never() -> None:
    table = SequenceTable(2, 4)
    first, second, third, fourth = (made(str(n), temperature=0.1 * n) for n in range(1, 5))
    rows = table.rows((item(first), item(second)))
    first.state = SequenceState.FINISHED
    assert table.rows((item(third),)).tolist() == [rows[0]]
    found = table.rows((item(second), item(third), item(fourth)))  # more than there were rows
    assert len(set(found.tolist())) == 3
    assert found[0] == rows[1]
    assert [round(float(value), 6) for value in table.temperature[found]] == [0.2, 0.3, 0.4]


def test_what_needs_the_host_and_what_is_adjusted_is_known() -> None:
    table = SequenceTable(8, 4)
    plain = [made("a"), made("b", temperature=0.0, top_k=5)]
    others = [
        made("c", logprobs=1),
        made("d", presence_penalty=1.0),
        made("e", prompt_logprobs=0, logit_bias={3: 1.0}),
        made("f", min_tokens=1),
    ]
    rows = table.rows(tuple(item(sequence) for sequence in plain + others))
    assert table.is_alone[rows].tolist() == [True, True, False, True, False, True]
    assert table.is_adjusted[rows].tolist() == [False, False, False, True, True, True]
