from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.errors import ConfigError, UserError
from turbolm.eval.checks import KINDS, DataError
from turbolm.eval.data import read_item, read_items, report_problems

ASK = {"messages": [{"role": "user", "content": "How are you?"}]}


@pytest.fixture
def write(tmp_path: Path):
    def lines(*rows: object) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return lines


def test_items_in_order_with_their_lines(write) -> None:
    path = write({"prompt": "2 + 2 =", "reference": 4}, "", {"id": "sky", **ASK, "max_tokens": 9}, {"text": "Once."})
    items, problems = read_items(path)
    assert not problems
    assert [(item.id, item.line) for item in items] == [("line 1", 1), ("sky", 3), ("line 4", 4)]
    assert items[0].check is not None
    assert items[0].check.kind == "number"
    assert items[1].max_tokens == 9
    assert items[1].question == "user: How are you?"
    assert not any(item.is_probe for item in items)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON object is wanted"),
        ("{}", "give one of 'messages', 'prompt' and 'text'; this has none"),
        ({"prompt": "x", **ASK}, "this has messages and prompt"),
        ({"promt": "x"}, "unknown field 'promt'. Did you mean 'prompt'?"),
        ({"prompt": ""}, "'prompt' must be a non-empty text"),
        ({"prompt": 3}, "'prompt' must be a non-empty text, got 3"),
        ({"messages": "hi"}, "'messages' must be a non-empty list"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "message 1 has the role 'usr'; allowed: system, user"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "x"}]}, "make it the 'reference'"),
        ({**ASK, "max_tokens": 0}, "'max_tokens' must be a whole number, 1 or more"),
        ({**ASK, "tools": [{"name": "f"}]}, "tool 1 must be"),
        ({"text": "Once.", "reference": "x"}, "a 'text' has no answer"),
        ({**ASK, "check": "exakt", "reference": "x"}, "unknown check 'exakt'. Did you mean 'exact'?"),
        (
            {**ASK, "check": {"kind": "exact", "case": True}, "reference": "x"},
            "no option 'case'. It has: ignore_case",
        ),
        ({**ASK, "check": {"kind": "number", "tolerance": "1"}, "reference": 1}, "can't be '1'"),
        ({**ASK, "check": "exact"}, "needs a 'reference' that is a text"),
        ({**ASK, "check": "number", "reference": "many"}, "'reference' that is a number, got 'many'"),
        ({**ASK, "check": {"kind": "regex", "pattern": "("}}, "needs a 'pattern'"),
        ({**ASK, "check": "json_schema"}, "needs a 'schema'"),
        ({**ASK, "schema": {"typ": "object"}}, "keyword 'typ', which turbolm doesn't know. Did you mean 'type'?"),
        ({**ASK, "choices": ["a"], "reference": "a"}, "two or more texts"),
        ({**ASK, "choices": ["a", "a"], "reference": "a"}, "two of the 'choices' are equal"),
        ({**ASK, "choices": ["a", "b"], "reference": "c"}, "must be one of the 'choices'"),
        ({**ASK, "choices": ["a", "b"], "reference": 2}, "must be one of the 'choices'"),
        ({**ASK, "check": "tool_call", "reference": {"name": "f"}}, "needs the 'tools'"),
        ({**ASK, "check": {"kind": "python", "expression": "1"}}, "allow it with --allow-code"),
        ({**ASK, "check": {"kind": "rouge", "variant": "rougeX"}, "reference": "x"}, "'variant' is 'rougeX'; allowed:"),
    ],
)
def test_bad_lines_are_named_and_the_rest_is_read(write, row: object, message: str) -> None:
    items, problems = read_items(write(ASK, row, {"prompt": "x"}))
    assert [item.line for item in items] == [1, 3]
    assert [problem.line for problem in problems] == [2]
    assert message in str(problems[0])
    report_problems(problems, keep_going=True)
    with pytest.raises(UserError, match=r"1 items of the data can't be used.*--keep-going:\n  line 2: "):
        report_problems(problems, keep_going=False)


def test_two_items_of_one_id(write) -> None:
    _, problems = read_items(write({"id": "a", **ASK}, {"id": "a", "prompt": "x"}))
    assert str(problems[0]) == "line 2: the id 'a' is that of line 1, too; give each item its own"


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_items(tmp_path / "empty.jsonl")


def test_the_key_is_what_an_answer_depends_on() -> None:
    item = read_item({"id": "a", **ASK, "reference": "fine"}, 1)
    assert item.key == read_item({"id": "b", "group": "g", "reference": "fine", **ASK}, 7).key
    assert item.key != read_item({"id": "a", **ASK, "reference": "well"}, 1).key


@pytest.mark.parametrize("name", ["examples", "examples/similarity"])
def test_shipped_examples(name: str) -> None:
    """A dozen of each kind; those of similarity need packages that may be missing."""
    items, problems = read_items(name)
    assert all("needs the package" in problem.message for problem in problems)
    groups = [item.group for item in items]
    assert all(groups.count(group) == 12 for group in groups)
    for item in items:
        if item.check is not None:
            assert item.check.kind == item.group


def test_examples_cover_the_checks_that_need_nothing() -> None:
    groups = {item.group for item in read_items("examples")[0]}
    assert groups >= set(KINDS) - {"rouge", "bleu", "chrf", "python", "judge"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "text", "reference", "choices", "check", "schema", "tools", "max_tokens", "group", "id"]
)


@given(st.dictionaries(FIELDS, json_values, max_size=5))
def test_any_json_is_an_item_or_an_error_of_ours(fields: dict[str, object]) -> None:
    try:
        read_item(fields, 1)
    except DataError as error:
        assert str(error)
