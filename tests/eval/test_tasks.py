"""The shipped questions with right answers."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from turbolm.eval.checks import ToolCall
from turbolm.eval.data import EXAMPLES, Item, keeps_going, read_items

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

import make_tasks  # noqa: E402


@pytest.fixture(scope="module")
def items() -> list[Item]:
    found, problems = read_items("examples/tasks")
    assert not problems
    return found


def test_there_are_enough_to_decide(items: list[Item]) -> None:
    """5% of what the base solves takes 60 items that it solves."""
    assert Counter(item.group for item in items) == {name: count for name, (_, count) in make_tasks.GROUPS.items()}
    assert len({item.key for item in items}) == len(items) > 200
    assert all(item.check is not None for item in items)


def test_they_are_what_the_script_makes() -> None:
    lines = EXAMPLES["examples/tasks"].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(make_tasks.items())


def right_answer(item: Item) -> str:
    fields = item.fields
    if "schema" in fields:
        return json.dumps({name: rule["const"] for name, rule in fields["schema"]["properties"].items()})
    return str(fields["reference"])


def test_right_answers_pass_and_others_do_not(items: list[Item]) -> None:
    calls: tuple[ToolCall, ...] = ()
    for item in items:
        assert item.check is not None
        right = right_answer(item)
        assert item.check.grade(right, calls).score == 1, item.id
        if not item.check.is_log_likelihood:
            assert item.check.grade(f" {right}", calls).score == 1, item.id
            assert item.check.grade(f"{right}9", calls).score == 0, item.id
        assert item.check.grade("something else", calls).score == 0, item.id


def test_problems_of_shipped_questions_are_not_the_users() -> None:
    assert keeps_going("examples/tasks")
