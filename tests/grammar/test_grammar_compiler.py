from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.errors import ConfigError, RequestError
from turbolm.eval.json_schema import mismatch
from turbolm.form import MAX_GRAMMAR_CHARS, MAX_SCHEMA_DEPTH, Grammar
from turbolm.grammar import GrammarCompiler, MaskRows, fill_masks
from turbolm.grammar.compiler import MAX_CACHED
from turbolm.text import byte_tokenizer

TOKENIZER = byte_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER)
EOS = TOKENIZER.eos_ids[0]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def takes(accepts, grammar: Grammar, text: str) -> bool:
    return accepts(COMPILER.compile(grammar), list(text.encode()), EOS)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json"), ['{"a": [1, null, {"b": "é"}]}', "{}", '{\n  "a": 1\n}'], ["[1]", '{"a": }', "{}}", "1"]),
        (Grammar("json_schema", PERSON), ['{"name": "x", "age": 3}'], ['{"name": "x"}', '{"name": 1, "age": 3}']),
        (Grammar("json_schema", json.dumps(PERSON)), ['{"name":"x","age":-3}'], ['{"name":"x","age":3,"b":1}']),
        (Grammar("regex", r"[a-z]+/\d{2}"), ["ab/12"], ["ab/1", "/12", "ab/123"]),
        (Grammar("choice", ["yes", "yes, sir", 'a "b"\n']), ["yes", "yes, sir", 'a "b"\n'], ["ye", "no", "yes,"]),
        (Grammar("ebnf", 'start: sum\nsum: N ("+" N)*\nN: /[0-9]+/'), ["1", "12+3"], ["1+", "+"]),
        (Grammar("ebnf", 'root ::= "a" root "b" | "c"'), ["c", "aacbb"], ["aacb", "ab"]),
    ],
    ids=["json", "schema", "schema text", "regex", "choice", "lark", "gbnf"],
)
def test_exactly_what_a_grammar_says(grammar: Grammar, good: list[str], bad: list[str], accepts) -> None:
    assert [takes(accepts, grammar, text) for text in good] == [True] * len(good)
    assert [takes(accepts, grammar, text) for text in bad] == [False] * len(bad)


def test_space_in_json_is_bounded(accepts) -> None:
    assert takes(accepts, Grammar("json"), '{\n\t"a": 1}')
    assert not takes(accepts, Grammar("json"), '{\n\n"a": 1}')
    assert not takes(accepts, Grammar("json"), '{"a":' + " " * 60 + "1}")


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("regex", "(a", "unclosed group"),
        ("ebnf", "start: missing", "missing"),
        ("ebnf", 'root ::= "a" (', r"Expected '\)'"),
        ("ebnf", 'start: start "a"', "no text at all"),
        ("json_schema", {"type": "strin"}, "strin"),
        ("json_schema", {"not": {"type": "string"}}, "not"),
        ("json_schema", {"$ref": "http://example.com/schema"}, "example.com"),
    ],
)
def test_a_bad_grammar_says_why(kind: str, value: object, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        COMPILER.compile(Grammar(kind, value, parameter="response_format"))  # type: ignore[arg-type]
    assert caught.value.parameter == "response_format"
    assert str(caught.value).startswith("response_format can't be used")


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("yaml", None, "Known: json, json_schema"),
        ("json", "x", "takes no value"),
        ("json_schema", "{", "no JSON"),
        ("json_schema", [1], "an object"),
        ("json_schema", True, "an object"),
        ("json_schema", "[" * 100_000, "no JSON"),
        ("json_schema", nested(MAX_SCHEMA_DEPTH + 1), f"more than {MAX_SCHEMA_DEPTH} deep"),
        ("regex", "a" * (MAX_GRAMMAR_CHARS + 1), "characters"),
        ("regex", None, "a string"),
        ("choice", [], "non-empty"),
        ("choice", ["a", 1], "non-empty"),
        ("choice", "ab", "takes a list"),
        ("ebnf", 3, "a string"),
    ],
)
def test_what_no_grammar_can_be(kind: str, value: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Grammar(kind, value)  # type: ignore[arg-type]


def test_many_choices(accepts) -> None:
    grammar = COMPILER.compile(Grammar("choice", [f"answer {number}" for number in range(9000)]))
    assert accepts(grammar, list(b"answer 8999"), EOS)
    assert not accepts(grammar, list(b"answer 9000"), EOS)


def test_long_chains_of_rules_end_no_process() -> None:
    rules = "\n".join(f'r{number}: r{number + 1} "a" | "b"' for number in range(4000))
    COMPILER.compile(Grammar("ebnf", f'start: r0\n{rules}\nr4000: "c"'))


def test_a_grammar_that_takes_too_much_work_says_so() -> None:
    state = COMPILER.compile(Grammar("ebnf", 'start: "x"{1000000}')).start()
    state.follow(list(b"x"))
    words = np.full((1, 9), -1, np.int32)
    fill_masks([MaskRows(state, 0)], words)
    assert not words.any()
    assert state.error is not None
    assert "items" in state.error


def test_compiled_once_per_content_and_few_are_kept() -> None:
    compiler = GrammarCompiler(TOKENIZER)
    first = compiler.compile(Grammar("json_schema", {"type": "string"}))
    assert compiler.compile(Grammar("json_schema", '{"type":"string"}', parameter="guided_json")) is first
    for number in range(MAX_CACHED):
        compiler.compile(Grammar("choice", [str(number)]))
    assert compiler.compile(Grammar("json_schema", {"type": "string"})) is not first


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install llguidance"):
        GrammarCompiler(TOKENIZER).compile(Grammar("json"))


@pytest.mark.parametrize("closer", ["</think>", "<|im_start|>"], ids=["text", "control token"])
def test_thoughts_come_before(closer: str, accepts) -> None:
    end = [256] if closer == "<|im_start|>" else list(closer.encode())
    open_already = COMPILER.compile(Grammar("choice", ["yes"], ("", closer)))
    assert accepts(open_already, [*b'hm {"}\n no', *end, *b"\n\nyes"], EOS)
    assert not accepts(open_already, list(b"yes"), EOS)
    optional = COMPILER.compile(Grammar("choice", ["yes"], ("<think>", closer)))
    assert accepts(optional, list(b"yes"), EOS)
    assert accepts(optional, [*b"<think>so", *end, *b"yes"], EOS)
    assert not accepts(optional, [*b"so", *end, *b"yes"], EOS)


def test_masks_of_drafts_are_those_of_the_tokens(allowed) -> None:
    grammar = COMPILER.compile(Grammar("json_schema", PERSON))
    text = b'{"name": "ab", "age": 12}'
    drafted, lone = grammar.start(), grammar.start()
    drafted.follow(text[:4])
    words = np.full((8, grammar.num_words), -1, np.int32)
    fill_masks([MaskRows(drafted, 1, tuple(text[4:9])), MaskRows(grammar.start(), 0)], words)
    for count in range(6):
        lone.follow(text[: 4 + count])
        expected = np.zeros((1, grammar.num_words), np.int32)
        fill_masks([MaskRows(lone, 0)], expected)
        assert (words[1 + count] == expected[0]).all()
    assert allowed(drafted, grammar.num_words) == allowed(follow(grammar, text[:4]), grammar.num_words)


def follow(grammar, text: bytes):
    state = grammar.start()
    state.follow(text)
    return state


def test_a_wrong_draft_changes_nothing(allowed) -> None:
    grammar = COMPILER.compile(Grammar("choice", ["abc"]))
    state = grammar.start()
    words = np.full((3, grammar.num_words), -1, np.int32)
    fill_masks([MaskRows(state, 0, tuple(b"ax"))], words)
    assert state.error is None
    assert allowed(state, grammar.num_words) == {ord("a")}


scalars = st.sampled_from([
    {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"},
    {"type": "string", "maxLength": 8}, {"enum": ["a", 1, None]}, {"type": "integer", "minimum": -5, "maximum": 17},
    {"const": {"k": 1}}, {"type": ["integer", "null"]}, {"type": "string", "pattern": "^[ab]{1,3}$"},
])  # fmt: skip


def _containers(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    def as_object(properties: dict, count: int) -> dict:
        required = sorted(properties)[:count]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    objects = st.builds(as_object, st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), st.integers(0, 3))
    arrays = st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(1, 3)
    )
    return objects | arrays | st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=st.recursive(scalars, _containers, max_leaves=6), seed=st.integers(0, 1000))
def test_whatever_a_schema_allows_validates(schema: dict, seed: int, random_answer) -> None:
    grammar = COMPILER.compile(Grammar("json_schema", schema))
    text = bytes(random_answer(grammar, TOKENIZER, seed)).decode()
    # A number may have any exponent, of which Python makes infinity.
    value = json.loads(text, parse_float=lambda number: max(-1e308, min(float(number), 1e308)))
    assert mismatch(value, schema) is None
