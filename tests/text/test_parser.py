from __future__ import annotations

import itertools
import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from turbolm.errors import ConfigError
from turbolm.text.detokenizer import Detokenizer
from turbolm.text.parser import (
    REASONING_FORMATS,
    PartParser,
    choose_reasoning_format,
    choose_tool_format,
    parser_for,
)
from turbolm.text.tool_formats import TOOL_FORMATS
from turbolm.types import Part, ReasoningPart, TextPart, ToolCallPart, join_parts

THINK = REASONING_FORMATS["think"]
DEEPSEEK = {
    "begin": "<｜tool▁calls▁begin｜>",
    "call": "<｜tool▁call▁begin｜>",
    "sep": "<｜tool▁sep｜>",
    "end_call": "<｜tool▁call▁end｜>",
    "end": "<｜tool▁calls▁end｜>",
}


def deepseek(text: str) -> str:
    return re.sub(r"<(\w+)>", lambda match: DEEPSEEK[match[1]], text)


def feed(parser: PartParser, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in parser.push(piece)]
    return parts + list(parser.finish())


def plain(parts: tuple[Part, ...] | list[Part]) -> list[object]:
    """Joined parts: text as str, reasoning as ("think", text), calls as (name, arguments). Checks
    that indices count up, ids are there and unique, and no part is empty."""
    result: list[object] = []
    ids = []
    for part in join_parts(parts):
        if isinstance(part, ToolCallPart):
            assert part.index == len(ids)
            assert part.id
            ids.append(part.id)
            result.append((part.name, part.arguments))
        else:
            assert part.text
            result.append(part.text if isinstance(part, TextPart) else ("think", part.text))
    assert len(set(ids)) == len(ids)
    return result


def parse(form: str, text: str, **options: object) -> list[object]:
    """Calls with their arguments as values, so that spacing does not count."""
    parts = plain(feed(PartParser(TOOL_FORMATS[form], **options), [text]))
    return [(p[0], json.loads(p[1])) if isinstance(p, tuple) and p[0] != "think" else p for p in parts]


NASTY = {"s": 'a "quoted" }{ \\ ]\n</tool_call> [TOOL_CALLS]', "n": [1, -2.5e3, {"x": {}}], "u": "汉字🙂", "b": None}
NASTY_JSON = json.dumps(NASTY, ensure_ascii=False)
PARIS = {"city": "Paris"}

EXAMPLES = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>', [("f", PARIS)]),
    (
        "hermes",
        'Let me see.\n<tool_call>{"arguments": {"city": "Paris"}, "name": "f"}</tool_call>\n'
        f'<tool_call>{{"name": "g.h-2", "arguments": {NASTY_JSON}}}</tool_call> Done. ',
        ["Let me see.", ("f", PARIS), ("g.h-2", NASTY), "Done. "],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"city\\": \\"Paris\\"}"}', [("f", PARIS)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1\n2\t"}}</tool_call>', [("f", {"a": "1\n2\t"})]),
    ("llama3_json", '{"name": "f", "parameters": {"city": "Paris"}}', [("f", PARIS)]),
    (
        "llama3_json",
        f' \n{{"type": "function", "name": "f", "parameters": {NASTY_JSON}}}; {{"name": "g", "parameters": {{}}}}',
        [("f", NASTY), ("g", {})],
    ),
    ("llama3_json", 'Hm. <|python_tag|>{"name": "f", "parameters": {"city": "Paris"}}', ["Hm.", ("f", PARIS)]),
    ("pythonic", '[f(city="Paris")]', [("f", PARIS)]),
    (
        "pythonic",
        "[f(a=1, b='it\\'s \"x\" ]', c=[1, 2.5, -3,], d={'k': (True, None)}), m.g(), h(x=\"\"\"a\"b\n\"\"\")]\n",
        [
            ("f", {"a": 1, "b": 'it\'s "x" ]', "c": [1, 2.5, -3], "d": {"k": [True, None]}}),
            ("m.g", {}),
            ("h", {"x": 'a"b\n'}),
        ],
    ),
    ("pythonic", r"[f(a='\u6c49\x41\101\n\d\\', b='', c=0x10, d=1_000, e=.5)]",
     [("f", {"a": "汉AA\n\\d\\", "b": "", "c": 16, "d": 1000, "e": 0.5})]),
    ("pythonic", 'Hm. <|python_start|>[f(city="Paris")]<|python_end|> So.', ["Hm.", ("f", PARIS), "So."]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"city": "Paris"}}]', [("f", PARIS)]),
    (
        "mistral",
        f'Hm. [TOOL_CALLS][{{"name": "f", "arguments": {{}}, "id": "abcdefghi"}}, '
        f'{{"name": "g", "arguments": {NASTY_JSON}}}]',
        ["Hm.", ("f", {}), ("g", NASTY)],
    ),
    (
        "mistral",
        f'[TOOL_CALLS]f[ARGS]{{"city": "Paris"}}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{NASTY_JSON}[TOOL_CALLS]h{{}}',
        [("f", PARIS), ("g", NASTY), ("h", {})],
    ),
    (
        "internlm",
        'I look.\n<|action_start|> <|plugin|>\n{"name": "f", "parameters": {"city": "Paris"}}<|action_end|>\n',
        ["I look.", ("f", PARIS)],
    ),
    (
        "deepseek",
        deepseek(
            'Hm.<begin><call>function<sep>f\n```json\n{"city": "Paris"}\n```<end_call>\n'
            f"<call>function<sep>g\n```json\n{NASTY_JSON}\n```<end_call><end>"
        ),
        ["Hm.", ("f", PARIS), ("g", NASTY)],
    ),
    (
        "deepseek",
        deepseek(f'<begin><call>f<sep>{{"city": "Paris"}}<end_call><call>g<sep>{NASTY_JSON}<end_call><end>'),
        [("f", PARIS), ("g", NASTY)],
    ),
    (
        "qwen3_coder",
        "On it.\n\n<tool_call>\n<function=f>\n<parameter=city>\nParis\n</parameter>\n<parameter=code>\n"
        'if a < b:\n    print("}")\n\n</parameter>\n<parameter=n>\n3\n</parameter>\n<parameter=l>\n["x", {}]\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call><function=g></function></tool_call>",
        ["On it.", ("f", {"city": "Paris", "code": 'if a < b:\n    print("}")\n', "n": 3, "l": ["x", {}]}), ("g", {})],
    ),
    ("qwen3_coder", "<function=f><parameter=city>Paris</parameter></function>", [("f", PARIS)]),
]  # fmt: skip

#: What looks like calls and is none; "{" or "[" first for the formats that begin so.
MALFORMED = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_ca"),
    ("hermes", "see <tool_call> in the docs </tool_call> "),
    ("hermes", '<tool_call>{"name": "f", "arguments": 3}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "no json"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    ("hermes", '<tool_call>{"name": "f" "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
    ("llama3_json", '{"title": "An ordinary answer", "pages": [1, 2]}'),
    ("llama3_json", '{"name": "Bob"}'),
    ("llama3_json", "{ not json }"),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("llama3_json", 'As JSON: {"name": "f", "parameters": {}}'),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[see f(a)](https://example.com/a)"),
    ("pythonic", "[f(a=1)](https://example.com/a) is a link"),
    ("pythonic", "[f(a=1), g(b=2"),
    ("pythonic", "[f(a=nan)]"),
    ("pythonic", "[f(a=1, a=2)]"),
    ("pythonic", "[f(a=b)]"),
    ("pythonic", "[f(a=" + "[" * 200 + "]" * 200 + ")]"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS]hello there"),
    ("internlm", "<|action_start|><|interpreter|>\n```python\nprint(1)\n```<|action_end|>"),
    ("deepseek", deepseek("<begin><end>")),
    ("deepseek", deepseek("<begin><call>function<sep>f\n```json\n[1]\n```<end_call><end>")),
    ("qwen3_coder", "<tool_call>\n<fun>"),
    ("qwen3_coder", "a<function=f and more"),
]

#: Calls that break off or break the rules after their name: (format, text, what streaming gives).
CUT = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, "b', [("f", '{"a": [1, "b')]),
    (
        "hermes",
        'x <tool_call>{"name": "f", "arguments": {"a": nope}}</tool_call>',
        ["x", ("f", '{"a": '), "nope}}</tool_call>"],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\x"}}', [("f", '{"a": "'), '\\x"}}']),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 01}', [("f", '{"a": '), "01}"]),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter><para", [("f", '{"a": 1'), "<para"]),
]


def chunks(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)))
    bounds = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize(("form", "text", "expected"), EXAMPLES)
@pytest.mark.parametrize("stream_arguments", [True, False])
def test_examples(form, text, expected, stream_arguments):
    assert parse(form, text, stream_arguments=stream_arguments) == expected


ALL_TEXTS = [(form, text) for form, text, _ in EXAMPLES + CUT] + MALFORMED


@pytest.mark.parametrize(("form", "text"), ALL_TEXTS)
@pytest.mark.parametrize("stream_arguments", [True, False])
def test_single_characters_give_the_same(form, text, stream_arguments):
    whole = feed(PartParser(TOOL_FORMATS[form], stream_arguments=stream_arguments), [text])
    single = feed(PartParser(TOOL_FORMATS[form], stream_arguments=stream_arguments), list(text))
    assert plain(single) == plain(whole)


@settings(max_examples=300)
@given(st.data(), st.booleans())
def test_random_chunks_give_the_same(data, stream_arguments):
    form, text = data.draw(st.sampled_from(ALL_TEXTS))
    thinking = data.draw(st.sampled_from(["", "<think>\nso <b> {\n</think>\n\n", " <think></think>"]))
    options = {"reasoning_format": THINK, "stream_arguments": stream_arguments}
    whole = feed(PartParser(TOOL_FORMATS[form], **options), [thinking + text])
    cut = feed(PartParser(TOOL_FORMATS[form], **options), chunks(data, thinking + text))
    assert plain(cut) == plain(whole)


@pytest.mark.parametrize(("form", "text"), MALFORMED)
@pytest.mark.parametrize("stream_arguments", [True, False])
def test_malformed_calls_are_text(form, text, stream_arguments):
    assert parse(form, text, stream_arguments=stream_arguments) == [text]


@pytest.mark.parametrize(("form", "text", "expected"), CUT)
def test_calls_that_break_off(form, text, expected):
    assert plain(feed(PartParser(TOOL_FORMATS[form]), list(text))) == expected
    assert plain(feed(PartParser(TOOL_FORMATS[form], stream_arguments=False), list(text))) == [text]


def test_a_good_call_follows_a_malformed_one():
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for bad in ("<tool_call>{oops", '<tool_call>{"name":', "<tool_call>"):
        assert parse("hermes", f"a {bad}{good}") == [f"a {bad}", ("f", {})]
    assert parse("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"nome": 1}]') == [
        ("f", {}),
        ', {"nome": 1}]',
    ]


FRAGMENTS = sorted({
    *(piece for _, text in ALL_TEXTS for piece in re.findall(r"<[^<>]*>|\[\w*\]?|[{}\[\]\"':,;()=\\`]+|\w+|\s+", text)),
    *(marker for form in TOOL_FORMATS.values() for marker in form.openers + form.markers),
    "<think>", "</think>", '{"name": "f", "arguments": {', '{"name": "f", "parameters": {}}', "\\u12", '"', "\x00", "é",
})  # fmt: skip
RANDOM = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=15).map("".join))


@settings(max_examples=500)
@given(st.data(), RANDOM, st.sampled_from(sorted(TOOL_FORMATS)), st.booleans())
def test_random_text(data, text, form, stream_arguments):
    """Never an error; the same however cut; complete calls are valid; without calls the text is
    unchanged; with calls, text comes in order from the input."""
    whole = feed(PartParser(TOOL_FORMATS[form], stream_arguments=stream_arguments), [text])
    cut = feed(PartParser(TOOL_FORMATS[form], stream_arguments=stream_arguments), chunks(data, text))
    assert plain(cut) == plain(whole)
    joined = join_parts(whole)
    calls = [part for part in joined if isinstance(part, ToolCallPart)]
    if not calls:
        assert "".join(part.text for part in joined) == text
    if not stream_arguments:
        assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    position = 0
    for part in joined:
        if isinstance(part, TextPart):
            position = text.index(part.text, position) + len(part.text)


@given(st.lists(RANDOM, max_size=5))
def test_without_formats_text_passes_at_once(pieces):
    parser = parser_for(None, tools_given=False)
    for piece in pieces:
        assert plain(parser.push(piece)) == ([piece] if piece else [])
    assert parser.finish() == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), JSON, max_size=4)


@settings(max_examples=200)
@given(st.data(), OBJECTS, st.booleans(), st.sampled_from([None, 2]))
def test_arguments_are_the_models_own_text(data, value, ascii_only, indent):
    arguments = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert plain(feed(PartParser(TOOL_FORMATS["hermes"]), chunks(data, text))) == [("f", arguments)]


@settings(max_examples=200)
@given(st.data(), st.dictionaries(st.from_regex(r"[a-zß汉_][a-z0-9_]{0,5}", fullmatch=True), JSON, max_size=4))
def test_pythonic_arguments_are_converted(data, value):
    text = f"[f({', '.join(f'{name}={item!r}' for name, item in value.items())})]"
    ((name, arguments),) = plain(feed(PartParser(TOOL_FORMATS["pythonic"]), chunks(data, text)))
    assert (name, json.loads(arguments)) == ("f", value)


@pytest.mark.parametrize("form", ["hermes", "mistral", "deepseek", "internlm", "llama3_json"])
def test_arguments_stream(form):
    """The name goes out before the arguments are there, and most of these before their end."""
    text = max((text for name, text, _ in EXAMPLES if name == form), key=len)
    parser = PartParser(TOOL_FORMATS[form])
    so_far: list[Part] = []
    for char in text[: text.rindex("}")]:
        so_far += parser.push(char)
    call = [part for part in join_parts(so_far) if isinstance(part, ToolCallPart)][-1]
    assert call.name
    assert call.id
    assert call.arguments.startswith("{")
    assert len([part for part in so_far if isinstance(part, ToolCallPart)]) > 5


def test_ids():
    def call_id(form: str, text: str) -> str:
        (call,) = join_parts(feed(PartParser(TOOL_FORMATS[form]), [text]))
        assert isinstance(call, ToolCallPart)
        return call.id or ""

    hermes = '<tool_call>{"name": "f"}</tool_call>'
    assert call_id("hermes", hermes).startswith("call_")
    assert call_id("hermes", hermes) != call_id("hermes", hermes)
    assert re.fullmatch("[a-zA-Z0-9]{9}", call_id("mistral", "[TOOL_CALLS]f[ARGS]{}"))
    assert call_id("mistral", "[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}") == "abcDEF123"


def test_schema_decides_types_of_xml_values():
    properties = {
        "zip": {"type": "string"},
        "on": {"type": "boolean"},
        "n": {"type": "integer"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "none": {"type": ["string", "null"]},
        "broken": 3,
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    text = "<function=f>" + "".join(
        f"<parameter={name}>\n{value}\n</parameter>"
        for name, value in {
            "zip": "90210",
            "on": "True",
            "n": "7",
            "maybe": "5",
            "none": "null",
            "broken": "6",
            "other": "8",
            "odd": "08",
        }.items()
    )
    expected = {"zip": "90210", "on": True, "n": 7, "maybe": "5", "none": None, "broken": 6, "other": 8, "odd": "08"}
    assert parse("qwen3_coder", text + "</function>", tools=tools) == [("f", expected)]
    without = {"zip": 90210, "on": "True", "n": 7, "maybe": 5, "none": None, "broken": 6, "other": 8, "odd": "08"}
    for others in ([], [3], [{"function": "f"}], [{"name": "f", "parameters": []}], [{"name": "g"}]):
        assert parse("qwen3_coder", text + "</function>", tools=others) == [("f", without)]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nhm\n\nso\n</think>\n\nHello\n", False, [("think", "hm\n\nso"), "Hello\n"]),
        ("hm</think>Hello", True, [("think", "hm"), "Hello"]),
        ("<think>hm</think>Hello", True, [("think", "hm"), "Hello"]),
        ("<think>\n\n</think>\n\nHello", False, ["Hello"]),
        ("<think>hm, cut", False, [("think", "hm, cut")]),
        ("hm, cut </thi", True, [("think", "hm, cut </thi")]),
        ("No thought, and a <think> in </think> text", False, ["No thought, and a <think> in </think> text"]),
        ("  <thin", False, ["  <thin"]),
        ("</think>\n\n  - indented", True, ["  - indented"]),
        ("", True, []),
        (
            '<think>a <tool_call> b</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
            False,
            [("think", "a <tool_call> b"), ("f", "{}")],
        ),
    ],
)
def test_reasoning(text, opened, expected):
    def parser() -> PartParser:
        return PartParser(TOOL_FORMATS["hermes"], THINK, starts_in_reasoning=opened)

    assert plain(feed(parser(), [text])) == expected
    assert plain(feed(parser(), list(text))) == expected


def test_reasoning_before_calls_that_begin_the_answer():
    parser = PartParser(TOOL_FORMATS["llama3_json"], THINK)
    parts = feed(parser, list('<think>hm</think>\n\n{"name": "f", "parameters": {}}'))
    assert plain(parts) == [("think", "hm"), ("f", "{}")]


def test_reasoning_streams():
    parser = PartParser(None, THINK)
    assert parser.push("<think>") == ()
    assert parser.push("one two") == (ReasoningPart("one two"),)
    assert parser.push(" three <") == (ReasoningPart(" three"),)
    assert parser.push("/think>") == ()
    assert parser.push("a") == (TextPart("a"),)


def test_text_is_held_back_only_before_a_possible_marker():
    parser = PartParser(TOOL_FORMATS["hermes"])
    assert parser.push("Hello") == (TextPart("Hello"),)
    assert parser.push(" a < b <tool") == (TextPart(" a < b"),)
    assert parser.push("s>") == (TextPart(" <tools>"),)
    assert parser.push(" ") == ()
    assert parser.finish() == (TextPart(" "),)
    assert parser.finish() == ()


@pytest.mark.parametrize(
    ("template", "tool", "reasoning"),
    [
        (None, None, None),
        ("{{ messages }}", None, None),
        ("<tool_call>\n{\"name\": … </think>", "hermes", "think"),
        ("<tool_call>\n<function=x>", "qwen3_coder", None),
        ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", None),
        ("[THINK] [TOOL_CALLS]", "mistral", "magistral"),
        ("<think> <｜tool▁calls▁begin｜>", "deepseek", "think"),
        ("<|plugin|>", "internlm", None),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3_json", None),
        ("<|python_start|>", "pythonic", None),
    ],
)  # fmt: skip
def test_formats_are_chosen_by_the_template(template, tool, reasoning):
    chosen = choose_tool_format(template), choose_reasoning_format(template)
    assert chosen == (TOOL_FORMATS.get(tool), REASONING_FORMATS.get(reasoning))
    parser = parser_for(template, tools_given=True)
    assert (parser.tool_format, parser.reasoning_format) == chosen


def test_formats_by_name():
    parser = parser_for("<tool_call>", tools_given=True, tool_format="mistral", reasoning_format="think")
    assert (parser.tool_format, parser.reasoning_format) == (TOOL_FORMATS["mistral"], THINK)
    parser = parser_for("<tool_call><think>", tools_given=True, tool_format="none", reasoning_format="none")
    assert (parser.tool_format, parser.reasoning_format) == (None, None)
    assert parser_for("<tool_call>", tools_given=False).tool_format is None
    with pytest.raises(ConfigError, match=r"unknown tool format 'hermis'\. Did you mean 'hermes'"):
        parser_for(None, tools_given=True, tool_format="hermis")
    with pytest.raises(ConfigError, match="Known: auto, none, think"):
        parser_for(None, tools_given=False, reasoning_format="x")


def test_an_unknown_name_is_refused_without_tools_too():
    with pytest.raises(ConfigError):
        parser_for(None, tools_given=False, tool_format="hermis")


def test_markers_are_named():
    parser = PartParser(TOOL_FORMATS["mistral"], THINK)
    assert set(parser.markers) == {"<think>", "</think>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"}
    assert PartParser().markers == ()


def test_markers_that_are_special_tokens_reach_the_parser():
    """From token ids to parts: the end-of-turn token is left out, the call's markers are seen."""

    class Toy:
        tokens = ("<tool_call>", "</tool_call>", "<|im_end|>", '{"name": "f", ', '"arguments": {}}', "Hm.")
        special_ids = frozenset({0, 1, 2})

        def token_bytes(self, token_id: int) -> bytes:
            return self.tokens[token_id].encode()

        def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
            return "".join(self.tokens[i] for i in token_ids)

    parser = PartParser(TOOL_FORMATS["hermes"])
    keep = [Toy.tokens.index(marker) for marker in parser.markers]
    detokenizer = Detokenizer(Toy(), keep_ids=keep)
    pieces = [detokenizer.push([token_id]) for token_id in (5, 0, 3, 4, 1, 2)] + [detokenizer.finish()]
    assert plain(feed(parser, pieces)) == ["Hm.", ("f", "{}")]


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [("<|im_start|>assistant\n<think>\n", True), ("…\n<think>\n\n</think>\n\n", False), ("assistant\n", False)],
)
def test_whether_the_prompt_opened_the_block(prompt, is_open):
    assert THINK.is_open(prompt) is is_open


@pytest.mark.parametrize("form", sorted(TOOL_FORMATS))
def test_no_opener_begins_with_another(form):
    """Otherwise which of them is found would depend on where the text is cut."""
    openers = TOOL_FORMATS[form].openers
    assert not any(a != b and a.startswith(b) for a in openers for b in openers)
