from __future__ import annotations

import json
import re

import pytest

from turbolm.errors import ConfigError
from turbolm.eval.checks import ToolCall
from turbolm.eval.probes import PROBES, make_probes

KINDS = tuple(PROBES)


def right_answer(item) -> tuple[str, tuple[ToolCall, ...]]:
    """What the check's reference says, as a model would write it."""
    check = item.check
    if check.kind == "tool_call":
        return "", tuple(ToolCall(call["name"], json.dumps(call["arguments"])) for call in check.reference)
    if check.kind == "json_schema":
        return json.dumps({key: part["const"] for key, part in check.reference["properties"].items()}), ()
    return f"The answer: {check.reference[0] if check.kind == 'contains' else check.reference}", ()


def test_probes_of_a_seed_are_always_the_same_and_differ_from_each_other() -> None:
    probes = make_probes(KINDS, 5, 3, 50)
    assert [item.key for item in probes] == [item.key for item in make_probes(KINDS, 5, 3, 50)]
    assert len({item.key for item in probes}) == len({item.id for item in probes}) == 5 * len(KINDS)
    assert {item.key for item in probes}.isdisjoint(item.key for item in make_probes(("arithmetic",), 5, 4, 50))
    assert all(item.is_probe for item in probes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_answer_scores_and_another_does_not(kind: str) -> None:
    first, second = make_probes((kind,), 2, 0, 100)
    assert first.check is not None
    assert first.check.grade(*right_answer(first)).score == 1
    assert first.check.grade(*right_answer(second)).score == 0
    assert first.check.grade("I don't know.").score == 0


def test_no_question_comes_twice_even_if_there_are_no_more() -> None:
    words = make_probes(("languages",), 100, 0, 10)
    assert 20 < len({item.key for item in words}) == len(words) < 100


def test_arithmetic_is_right() -> None:
    for item in make_probes(("arithmetic",), 20, 1, 10):
        value = int(re.search(r"Start with (\d+)", item.question)[1])
        for verb, operand in re.findall(r"(add|subtract|multiply by) (\d)", item.question):
            value = {
                "add": value + int(operand),
                "subtract": value - int(operand),
                "multiply by": value * int(operand),
            }[verb]
        assert item.check.reference == value


def test_a_fact_hides_in_a_text_of_the_length_asked_for() -> None:
    for item in make_probes(("retrieval",), 5, 1, 400):
        assert 400 < len(item.question.split()) < 460
        assert item.question.count(item.check.reference[0]) == 1


def test_unknown_kinds() -> None:
    with pytest.raises(ConfigError, match=r"unknown probe 'jsn'\. Did you mean 'json'"):
        make_probes(("jsn",), 1, 0, 10)
