from __future__ import annotations

import pytest

from turbolm.eval.checks import Grade, ToolCall, read_check
from turbolm.eval.similarity import missing_package

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def grade(answer: str, calls: tuple[ToolCall, ...] = (), **fields: object) -> Grade:
    check = read_check({"prompt": "x", **fields}, allow_code=True)
    assert check is not None
    return check.grade(answer, calls)


@pytest.mark.parametrize(
    ("answer", "fields", "score"),
    [
        (" Paris\n", {"check": "exact", "reference": "Paris"}, 1),
        ("paris", {"check": "exact", "reference": "Paris"}, 0),
        ("paris", {"check": {"kind": "exact", "ignore_case": True}, "reference": "Paris"}, 1),
        ("Paris.", {"check": "exact", "reference": ["Paris", "Paris."]}, 1),
        ("It is PARIS,\n of course", {"reference": "paris, of"}, 1),
        ("It is Rome", {"reference": ["Paris", "Lyon"]}, 0),
        ("PARIS", {"check": {"kind": "contains", "ignore_case": False}, "reference": "Paris"}, 0),
        ("on 2024-05-06.", {"check": {"kind": "regex", "pattern": r"\d{4}-\d\d-\d\d"}}, 1),
        ("on 5/6", {"check": "regex", "reference": r"\d{4}-\d\d-\d\d"}, 0),
        ("12 + 30 makes 42.", {"reference": 42}, 1),
        ("42, or 43", {"reference": 42}, 0),
        ("about 1,250.5 euros", {"reference": "1250.5", "check": "number"}, 1),
        ("-3", {"reference": -3}, 1),
        ("3.2", {"check": {"kind": "number", "tolerance": 0.2}, "reference": 3}, 1),
        ("103", {"check": {"kind": "number", "relative": 0.02}, "reference": 100}, 0),
        ("1e3", {"reference": 1000}, 1),
        ("none at all", {"reference": 1}, 0),
        ("b", {"choices": ["a", "b"], "reference": 1}, 1),
        ("a", {"choices": ["a", "b"], "reference": "b"}, 0),
        ('{"age": 4}', {"schema": PERSON}, 1),
        ('Here:\n```json\n{"age": 4}\n```\nDone.', {"schema": PERSON}, 1),
        ('{"age": "4"}', {"schema": PERSON}, 0),
        ('{"age": 4} is the answer', {"schema": PERSON}, 0),
        ("x" * 5, {"check": {"kind": "python", "expression": "len(answer) == 5"}}, 1),
        ("4", {"check": {"kind": "python", "expression": "int(answer) / reference"}, "reference": 8}, 0.5),
        ("no", {"check": {"kind": "python", "expression": "int(answer)"}}, 0),
        ("9", {"check": {"kind": "python", "expression": "int(answer)"}}, 0),
    ],
)
def test_scores(answer: str, fields: dict[str, object], score: float) -> None:
    assert grade(answer, **fields).score == score


@pytest.mark.parametrize(
    ("calls", "score"),
    [
        ([], 0),
        ([("weather", '{"city": "Oslo"}')], 1),
        ([("weather", '{"city":"Oslo"}'), ("weather", '{"city":"Rome"}')], 0),
        ([("weather", '{"city": "oslo"}')], 0),
        ([("forecast", '{"city": "Oslo"}')], 0),
        ([("weather", '{"city": ')], 0),
    ],
)
def test_tool_calls_are_equal_or_not(calls: list[tuple[str, str]], score: float) -> None:
    given = tuple(ToolCall(*call) for call in calls)
    reference = [{"name": "weather", "arguments": {"city": "Oslo"}}]
    assert grade("", given, tools=[WEATHER], reference=reference).score == score


def test_tool_calls_in_any_order() -> None:
    reference = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    calls = tuple(ToolCall("weather", f'{{"city": "{city}"}}') for city in ("Rome", "Oslo"))
    assert grade("", calls, tools=[WEATHER], reference=reference).score == 1


def test_failed_checks_say_why() -> None:
    assert "not JSON" in grade("x", schema=PERSON).note
    assert grade('{"age": 1.5}', schema=PERSON).note == '$.age: 1.5 is not of type "integer"'
    assert "ValueError" in grade("x", check={"kind": "python", "expression": "int(answer)"}).note


@pytest.mark.parametrize("kind", ["rouge", "bleu", "chrf"])
def test_similarity_is_1_for_equal_texts_and_less_for_others(kind: str) -> None:
    if missing_package(kind):
        fields = {"prompt": "x", "reference": "y", "check": kind}
        with pytest.raises(ValueError, match="needs the package"):
            read_check(fields, allow_code=False)
        return
    reference = ["The cat sat on the mat today.", "A cat was sitting there."]
    same = grade(reference[0], check=kind, reference=reference).score
    near = grade("The cat sat on a rug today.", check=kind, reference=reference).score
    far = grade("Nothing alike", check=kind, reference=reference).score
    assert same == pytest.approx(1)
    assert 0 <= far < near < same
