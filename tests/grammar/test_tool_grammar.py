from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from turbolm.errors import RequestError
from turbolm.eval.json_schema import mismatch
from turbolm.grammar import GrammarCompiler, tool_grammar
from turbolm.grammar.tool_choice import LAYOUTS
from turbolm.text import PartParser, Tokenizer, byte_tokenizer
from turbolm.text.tokenizer import BYTE_ALPHABET
from turbolm.text.tool_formats import TOOL_FORMATS
from turbolm.types import ToolCallPart

TOKENIZER = byte_tokenizer()
COMPILER = GrammarCompiler(TOKENIZER)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "hourly": {"type": "boolean"},
    },
    "required": ["city"],
    "additionalProperties": False,
}
ROLL = {"type": "object", "properties": {"dice": {"type": "array", "items": {"$ref": "#/$defs/die"}, "maxItems": 3}},
        "required": ["dice"], "additionalProperties": False, "$defs": {"die": {"enum": [4, 6, 20]}}}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "roll", "parameters": ROLL}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"get_weather": WEATHER, "roll": ROLL, "now": {"type": "object"}}


def calls(format_name: str, text: str) -> list[tuple[str, dict]]:
    """What the parser of the format reads; nothing else may be in the text."""
    parser = PartParser(TOOL_FORMATS[format_name], tools=TOOLS)
    parts = [*parser.push(text), *parser.finish()]
    found: dict[int, list] = {}
    for part in parts:
        assert isinstance(part, ToolCallPart), text
        entry = found.setdefault(part.index, [part.name, ""])
        entry[1] += part.arguments
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


def test_every_format_has_a_layout() -> None:
    assert set(LAYOUTS) == {*TOOL_FORMATS, "mistral_args"}


@pytest.mark.parametrize("format_name", TOOL_FORMATS)
def test_what_a_grammar_allows_is_read_as_calls_that_fit(format_name: str, random_answer) -> None:
    grammar = COMPILER.compile(tool_grammar(format_name, TOOLS, TOKENIZER))
    names = set()
    for seed in range(12):
        found = calls(format_name, bytes(random_answer(grammar, TOKENIZER, seed)).decode())
        assert found
        for name, arguments in found:
            assert mismatch(arguments, SCHEMAS[name]) is None
            names.add(name)
    assert len(names) > 1


@pytest.mark.parametrize("format_name", TOOL_FORMATS)
def test_the_named_tool_alone_and_once(format_name: str, random_answer) -> None:
    grammar = COMPILER.compile(tool_grammar(format_name, TOOLS, TOKENIZER, name="roll", is_single=True))
    for seed in range(5):
        assert [name for name, _ in calls(format_name, bytes(random_answer(grammar, TOKENIZER, seed)).decode())] == [
            "roll"
        ]


def test_texts_in_tags_are_free(accepts) -> None:
    tools = [
        {
            "function": {
                "name": "write",
                "parameters": {"properties": {"text": {"type": "string"}}, "required": ["text"]},
            }
        }
    ]
    grammar = COMPILER.compile(tool_grammar("qwen3_coder", tools, TOKENIZER))
    text = (
        '<tool_call>\n<function=write>\n<parameter=text>\nif a < "b":\n  </x>\n</parameter>\n</function>\n</tool_call>'
    )
    assert accepts(grammar, list(text.encode()), TOKENIZER.eos_ids[0])
    assert calls("qwen3_coder", text) == [("write", {"text": 'if a < "b":\n  </x>'})]


def test_markers_that_are_control_tokens(accepts) -> None:
    backend = tokenizers.Tokenizer(models.BPE(dict(BYTE_ALPHABET), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("</s>", "[TOOL_CALLS]", "[ARGS]")])
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "</s>"})
    grammar = GrammarCompiler(tokenizer).compile(tool_grammar("mistral", TOOLS, tokenizer))
    spelled = "[TOOL_CALLS]now[ARGS]{}"
    assert accepts(grammar, tokenizer.encode(spelled, add_special=False, parse_special=True), tokenizer.eos_ids[0])
    assert not accepts(grammar, tokenizer.encode(spelled, add_special=False), tokenizer.eos_ids[0])
    assert calls("mistral", spelled) == [("now", {})]


@pytest.mark.parametrize(
    ("tools", "name", "words"),
    [
        (TOOLS, "missing", "get_weather, roll, now"),
        ([{"function": {"name": "a b"}}], None, "letters, digits"),
        ([{"function": {"name": "f", "parameters": {"type": "array"}}}], None, "schema of an object"),
        ([{"function": {"name": "f", "parameters": 3}}], None, "schema of an object"),
    ],
)
def test_tools_that_no_grammar_has(tools: list, name: str | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tool_grammar("hermes", tools, TOKENIZER, name=name)
