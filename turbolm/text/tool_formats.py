"""How model families write tool calls: one class each, one line in `TOOL_FORMATS`.

A reader is a small grammar. Once a call is complete it is lenient about closing markers, which models
and stop tokens leave out; everything before that must be exact, or the text is an ordinary answer.
"""

from __future__ import annotations

import re
import secrets
import string
from typing import ClassVar

from turbolm.text.literals import (
    as_json,
    ignore,
    quote,
    read_json,
    read_python_arguments,
    take_json_string,
)
from turbolm.text.scanner import Mismatch, Scanner, Sink, Steps
from turbolm.text.tool_calls import ToolCalls

_NAME = re.compile(r"[\w.\-/:]*")


class ToolFormat:
    """One way to write tool calls. A `PartParser` calls `read` where one of `openers` comes, or where
    the answer begins with one of the characters of `starts`; `read` must read that in any case."""

    name: ClassVar[str]
    template_marks: ClassVar[tuple[str, ...]]  # a chat template that contains one of these uses the format
    openers: ClassVar[tuple[str, ...]] = ()
    starts: ClassVar[str] = ""
    markers: ClassVar[tuple[str, ...]] = ()  # further markers; those that are special tokens are kept as text
    is_atomic: ClassVar[bool] = False  # calls count only after all of a group were read

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        """Reads a group of calls; raises Mismatch where the text is none."""
        raise NotImplementedError

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


class Hermes(ToolFormat):
    """Hermes 2 Pro, Qwen 2.5 and 3, and many others: `<tool_call>{"name": …, "arguments": {…}}
    </tool_call>`, once per call. Source: NousResearch/Hermes-Function-Calling, Qwen's chat templates."""

    name = "hermes"
    template_marks = ("<tool_call>",)
    openers = ("<tool_call>",)
    markers = ("</tool_call>",)

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        yield from scan.expect("<tool_call>")
        yield from scan.skip_space()
        yield from read_call(scan, calls, self.new_id())
        yield from scan.skip_space()
        yield from scan.has("</tool_call>")


class QwenCoder(ToolFormat):
    """Qwen3-Coder: `<tool_call><function=name><parameter=x>value</parameter>…</function></tool_call>`.
    One line break at each end of a value is layout. A value is JSON where the tool's schema or, without
    one, its spelling says so, else a string. Source: the model's chat template and parser."""

    name = "qwen3_coder"
    template_marks = ("<function=",)
    openers = ("<tool_call>", "<function=")
    markers = ("</tool_call>",)
    _tag = re.compile(r"[^<>\n]*")

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        if (yield from scan.has("<tool_call>")):
            yield from scan.skip_space()
        yield from scan.expect("<function=")
        function = (yield from scan.take(self._tag)).strip()
        yield from scan.expect(">")
        calls.begin(function, self.new_id())
        calls.write("{")
        separator = ""
        while True:
            yield from scan.skip_space()
            if (yield from scan.has("</function>")):
                break
            yield from scan.expect("<parameter=")
            parameter = (yield from scan.take(self._tag)).strip()
            yield from scan.expect(">")
            value = yield from scan.until("</parameter>")
            kinds = calls.parameter_types(function, parameter)
            calls.write(f"{separator}{quote(parameter)}: {_typed(value, kinds)}")
            separator = ", "
        calls.write("}")
        calls.end()
        yield from scan.skip_space()
        yield from scan.has("</tool_call>")


class Llama3Json(ToolFormat):
    """Llama 3.1 to 3.3: `{"name": …, "parameters": {…}}` as the answer, or anywhere after
    `<|python_tag|>`; several are separated by semicolons. Source: Meta's prompt format pages."""

    name = "llama3_json"
    template_marks = ("<|python_tag|>", '"parameters": dictionary of argument name')
    openers = ("<|python_tag|>",)
    starts = "{"

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        yield from scan.has("<|python_tag|>")
        while True:
            yield from scan.skip_space()
            yield from read_call(scan, calls, self.new_id(), is_strict=True)
            yield from scan.skip_space()
            yield from scan.has(";")
            yield from scan.skip_space()
            if (yield from scan.peek()) != "{":
                return


class Pythonic(ToolFormat):
    """Llama 3.2 and 4, ToolACE: `[f(a=1), g(b="x")]` as the whole answer, or between
    `<|python_start|>` and `<|python_end|>`. Source: Meta's prompt format pages."""

    name = "pythonic"
    template_marks = ("<|python_start|>", "[func_name1(")
    openers = ("<|python_start|>",)
    starts = "["
    markers = ("<|python_end|>",)
    is_atomic = True  # a list in brackets may as well begin an ordinary answer

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        is_marked = yield from scan.has("<|python_start|>")
        yield from scan.skip_space()
        yield from scan.expect("[")
        while True:
            yield from scan.skip_space()
            name = yield from scan.take(_NAME)
            yield from scan.expect("(")
            calls.begin(name, self.new_id())
            yield from read_python_arguments(scan, calls.write)
            calls.end()
            yield from scan.skip_space()
            if not (yield from scan.has(",")):
                break
        yield from scan.expect("]")
        yield from scan.skip_space()
        if is_marked:
            yield from scan.has("<|python_end|>")
        elif (yield from scan.peek()):
            raise Mismatch


class Mistral(ToolFormat):
    """Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` up to tokenizer version 7, then
    `[TOOL_CALLS]name[ARGS]{…}`, with `[CALL_ID]id` before the arguments in version 11, once per
    call. Ids are nine letters and digits, as its templates demand. Source: mistral-common."""

    name = "mistral"
    template_marks = ("[TOOL_CALLS]",)
    openers = ("[TOOL_CALLS]",)
    markers = ("[CALL_ID]", "[ARGS]")

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        yield from scan.expect("[TOOL_CALLS]")
        yield from scan.skip_space()
        if (yield from scan.has("[")):
            while True:
                yield from scan.skip_space()
                yield from read_call(scan, calls, self.new_id())
                yield from scan.skip_space()
                if not (yield from scan.has(",")):
                    break
            yield from scan.has("]")
            return
        name = yield from scan.take(_NAME)
        call_id = self.new_id()
        if (yield from scan.has("[CALL_ID]")):
            call_id = yield from scan.take(_NAME)
        yield from scan.has("[ARGS]")
        yield from scan.skip_space()
        yield from read_arguments(scan, calls, name, call_id)
        calls.end()

    def new_id(self) -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class InternLM(ToolFormat):
    """InternLM 2 to 3: `<|action_start|><|plugin|>{"name": …, "parameters": {…}}<|action_end|>`. Code for
    `<|interpreter|>` is no tool call. Source: InternLM's chat format page."""

    name = "internlm"
    template_marks = ("<|plugin|>", "<|action_start|>")
    openers = ("<|action_start|>",)
    markers = ("<|plugin|>", "<|action_end|>")

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        yield from scan.expect("<|action_start|>")
        yield from scan.skip_space()
        yield from scan.expect("<|plugin|>")
        yield from scan.skip_space()
        yield from read_call(scan, calls, self.new_id())
        yield from scan.skip_space()
        yield from scan.has("<|action_end|>")


class DeepSeek(ToolFormat):
    """DeepSeek V3 and R1: `<｜tool▁calls▁begin｜>`, then `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, a
    fenced JSON block, `<｜tool▁call▁end｜>` per call, then `<｜tool▁calls▁end｜>`; V3.1 has
    `name<｜tool▁sep｜>{…}` instead. Source: the models' chat templates."""

    name = "deepseek"
    template_marks = ("<｜tool▁calls▁begin｜>",)
    openers = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
    markers = ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
    _head = re.compile(r"[^<｜\n]*")
    _line = re.compile(r"[^`{\n]*")

    def read(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        if (yield from scan.has("<｜tool▁calls▁begin｜>")):
            yield from scan.skip_space()
        yield from scan.expect("<｜tool▁call▁begin｜>")
        while True:
            yield from self._read_one(scan, calls)
            yield from scan.skip_space()
            if (yield from scan.has("<｜tool▁calls▁end｜>")) or not (yield from scan.has("<｜tool▁call▁begin｜>")):
                return

    def _read_one(self, scan: Scanner, calls: ToolCalls) -> Steps[None]:
        name = (yield from scan.take(self._head)).strip()
        yield from scan.expect("<｜tool▁sep｜>")
        yield from scan.skip_space()
        if (yield from scan.peek()) != "{":  # `name` was the word "function"
            name = (yield from scan.take(self._line)).strip()
            yield from scan.skip_space()
            yield from scan.has("```json")
            yield from scan.skip_space()
        yield from read_arguments(scan, calls, name, self.new_id())
        calls.end()
        yield from scan.skip_space()
        if (yield from scan.has("```")):
            yield from scan.skip_space()
        yield from scan.has("<｜tool▁call▁end｜>")


#: In the order in which a template is looked through: the telling marks first.
TOOL_FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (QwenCoder(), DeepSeek(), Mistral(), InternLM(), Hermes(), Pythonic(), Llama3Json())
}  # fmt: skip


def read_call(scan: Scanner, calls: ToolCalls, call_id: str, is_strict: bool = False) -> Steps[None]:
    """One call as a JSON object: "name" and "arguments" (or "parameters") in any order. Strict: both
    are needed, and other members are refused, so that an ordinary JSON answer is soon told apart."""
    yield from scan.expect("{")
    name = ""
    early: list[str] = []  # arguments that came before the name
    seen: set[str] = set()
    while True:
        yield from scan.skip_space()
        key = yield from take_json_string(scan)
        key = "arguments" if key == "parameters" else key
        if key in seen or (is_strict and key not in ("name", "arguments", "type", "id")):
            raise Mismatch
        seen.add(key)
        yield from scan.skip_space()
        yield from scan.expect(":")
        yield from scan.skip_space()
        if key == "name":
            name = yield from take_json_string(scan)
        elif key != "arguments":
            yield from read_json(scan, ignore)
        elif name:
            yield from read_arguments(scan, calls, name, call_id)
        else:
            yield from _read_object(scan, early.append)
        yield from scan.skip_space()
        if not (yield from scan.has(",")):
            break
    yield from scan.expect("}")
    if early or "arguments" not in seen:
        if is_strict and not early:
            raise Mismatch
        calls.begin(name, call_id)
        calls.write("".join(early) or "{}")
    calls.end()


def read_arguments(scan: Scanner, calls: ToolCalls, name: str, call_id: str) -> Steps[None]:
    """Begins a call with its arguments: a JSON object, or a string that holds one."""
    if (yield from scan.peek()) == "{":
        calls.begin(name, call_id)
        yield from read_json(scan, calls.write)
    else:
        text: list[str] = []
        yield from _read_object(scan, text.append)
        calls.begin(name, call_id)
        calls.write("".join(text))


def _read_object(scan: Scanner, sink: Sink) -> Steps[None]:
    char = yield from scan.peek()
    if char == "{":
        yield from read_json(scan, sink)
    else:
        value = as_json((yield from take_json_string(scan)))
        if value is None or value[0] != "{":
            raise Mismatch
        sink(value)


def _typed(value: str, kinds: frozenset[str]) -> str:
    """A parameter's text as JSON, by the types that its schema allows (none: not known)."""
    value = value.removeprefix("\n").removesuffix("\n")
    if "string" in kinds and not ("null" in kinds and value == "null"):
        return quote(value)
    spelled = value.strip().lower() if "boolean" in kinds else value
    return as_json(spelled) or quote(value)
