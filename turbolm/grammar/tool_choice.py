"""Grammars of tool calls, for answers that have to be some: each family's way to write them, with the tools' names
and the JSON schemas of their arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from turbolm.errors import RequestError
from turbolm.form import Grammar
from turbolm.grammar.compiler import JSON_SPACE
from turbolm.grammar.lark import literal
from turbolm.text import Tokenizer

_NAME = re.compile(r"[\w.\-/:]+")
_EMPTY = '""'


class CallLayout(NamedTuple):
    """What stands around names and arguments, as `text/tool_formats.py` reads it."""

    before_name: str
    before_arguments: str
    after_arguments: str
    separator: str = "\n"
    opening: str = ""  # before the first call
    closing: str = ""
    style: Literal["json", "python", "tags"] = "json"  # how arguments are written


#: By the name of the tool format. Sources: see there.
LAYOUTS: dict[str, CallLayout] = {
    "hermes": CallLayout('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    "qwen3_coder": CallLayout("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", style="tags"),
    "llama3_json": CallLayout('{"name": "', '", "parameters": ', "}", "; "),
    "pythonic": CallLayout("", "(", ")", ", ", "[", "]", "python"),
    "mistral": CallLayout('{"name": "', '", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]"),
    "mistral_args": CallLayout("[TOOL_CALLS]", "[ARGS]", "", ""),
    "internlm": CallLayout('<|action_start|><|plugin|>\n{"name": "', '", "parameters": ', "}<|action_end|>"),
    "deepseek": CallLayout(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>", "\n",
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    ),
}  # fmt: skip


def tool_grammar(
    format_name: str,
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    is_single: bool = False,
) -> Grammar:
    """A call of one of `tools` (as in OpenAI's requests), of the one of this name where it is given, or several calls
    in a row unless `is_single`. In the tags of Qwen's coder models, text arguments may be any text. Raises
    RequestError."""
    if format_name == "mistral" and tokenizer.token_id("[ARGS]") is not None:
        format_name = "mistral_args"
    layout = LAYOUTS[format_name]
    functions = [_function(tool) for tool in tools]
    if name is not None:
        known = [function["name"] for function in functions]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise RequestError(f"tool_choice names '{name}'; the tools are: {', '.join(known)}", "tool_choice")
    calls = "call" if is_single else f"call ({literal(layout.separator, tokenizer)} call)*"
    lines = [
        f"start: {literal(layout.opening, tokenizer)} {calls} {literal(layout.closing, tokenizer)}",
        f"call: {' | '.join(f'call_{index}' for index in range(len(functions)))}",
    ]
    for index, function in enumerate(functions):
        head = literal(layout.before_name + function["name"] + layout.before_arguments, tokenizer)
        lines.append(f"call_{index}: {head} arguments_{index} {literal(layout.after_arguments, tokenizer)}")
        lines += _arguments(layout.style, f"arguments_{index}", function["parameters"])
    return Grammar("ebnf", "\n".join(lines), parameter="tools")


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Its name and its parameters' schema."""
    function = tool.get("function", tool)
    name, parameters = function.get("name"), function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"tool_choice can't demand a tool of the name {name!r}: use letters, digits, '_', '-', '.', '/' or ':'",
            "tools",
        )
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"the parameters of tool '{name}' must be the schema of an object", "tools")
    return {"name": name, "parameters": {"type": "object", **parameters}}


def _arguments(style: str, rule: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """The rules of one tool's arguments."""
    if style == "json":
        yield f"{rule}: {_json(schema)}"
        return
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if not isinstance(properties, Mapping) or not all(_NAME.fullmatch(key) for key in properties):
        raise RequestError("names of a tool's parameters are letters, digits, '_', '-', '.', '/' or ':'", "tools")
    if style == "tags":
        tags = []
        for number, (key, inner) in enumerate(properties.items()):
            yield f"{rule}_{number}: {json.dumps(f'<parameter={key}>' + chr(10))} {rule}_value_{number}"
            yield from _tag_value(f"{rule}_value_{number}", inner, shared)
            tags.append(f"{rule}_{number}{'' if key in required else '?'}")
        yield f"{rule}: {' '.join(tags) or _EMPTY}"
        return
    last = len(properties)
    yield f"{rule}: {rule}_first_0"
    for number, (key, inner) in enumerate(properties.items()):
        yield f"{rule}_value_{number}: {_json({**inner, **shared} if isinstance(inner, Mapping) else {})}"
        for place, comma in (("first", ""), ("more", ", ")):  # whether another one stands before it
            given = f"{json.dumps(comma + key + '=')} {rule}_value_{number} {rule}_more_{number + 1}"
            left_out = "" if key in required else f" | {rule}_{place}_{number + 1}"
            yield f"{rule}_{place}_{number}: {given}{left_out}"
    yield f"{rule}_first_{last}: {_EMPTY}"
    yield f"{rule}_more_{last}: {_EMPTY}"


def _tag_value(rule: str, schema: Any, shared: Mapping[str, Any]) -> Iterator[str]:
    """A parameter's value up to the end of its tag. Text stands there as it is."""
    end = "\n</parameter>\n"
    schema = schema if isinstance(schema, Mapping) else {}
    if schema.get("type") != "string":
        yield f"{rule}: {_json({**schema, **shared})} {json.dumps(end)}"
    elif isinstance(schema.get("enum"), list):
        yield f"{rule}: ({' | '.join(json.dumps(str(text)) for text in schema['enum'])}) {json.dumps(end)}"
    else:
        yield rf"{rule}[suffix={json.dumps(end)}]: /(.|\n)*/"


def _json(schema: Mapping[str, Any]) -> str:
    try:
        return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_SPACE}}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a tool's parameters are no JSON schema: {error}", "tools") from None
