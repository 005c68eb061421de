"""An answer's text, as it comes, into text, reasoning and tool calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from turbolm.errors import ConfigError, nearest
from turbolm.text.scanner import Mismatch, Scanner, Steps
from turbolm.text.tool_calls import ToolCalls
from turbolm.text.tool_formats import TOOL_FORMATS, ToolFormat
from turbolm.types import Part, ReasoningPart, TextPart, join_parts

_SPACE = " \t\r\n"
_Format = TypeVar("_Format")
_LINE_BREAKS = re.compile(r"[\r\n]*")
_NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Markers around what a model thinks before it answers."""

    name: str
    opener: str
    closer: str

    def is_open(self, prompt: str) -> bool:
        """Does a rendered prompt end inside a block that it opened?"""
        return prompt.rstrip().endswith(self.opener)


#: think: DeepSeek-R1, Qwen 3, QwQ and most others. magistral: Mistral's reasoning models.
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    form.name: form
    for form in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("magistral", "[THINK]", "[/THINK]"),
    )
}


class PartParser:
    """One answer's parts, as its text comes; one instance per answer. The parts, joined
    (`types.join_parts`), do not depend on how the text was cut.

    - Without formats, text passes unchanged and at once. With them, text is held back only while
      it may be (the space before) a marker.
    - Reasoning counts at the start of the answer only; the space around its markers is layout. A
      block that is never closed is reasoning to its end.
    - Tool calls: space around them is layout. What looks like a call and is none comes out as text,
      verbatim. With `stream_arguments`, a call goes out from its name on, and its arguments as they
      come, each piece checked as far as it goes; where they break off, or break the rules of JSON,
      the call stays cut and the rest is text. Without, only complete calls go out, and all else
      is text.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None = None,
        reasoning_format: ReasoningFormat | None = None,
        *,
        starts_in_reasoning: bool = False,
        stream_arguments: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`starts_in_reasoning`: the prompt has opened the block. `tools`, as in the request, give
        the types of arguments that a format leaves open."""
        self.tool_format = tool_format
        self.reasoning_format = reasoning_format
        self._starts_in_reasoning = starts_in_reasoning
        self._scan = Scanner()
        is_atomic = tool_format is not None and tool_format.is_atomic
        self._calls = ToolCalls(self._scan, tools, stream_arguments, is_atomic)
        self._parts: list[Part] = []
        # Set while all text so far is handed out: the kind of part that further text is, unless this is found in it.
        self._passing: tuple[type[TextPart] | type[ReasoningPart], re.Pattern[str]] | None = None
        if tool_format is None and reasoning_format is None:
            self._passing = (TextPart, _NOTHING)
        self._steps = self._read_answer()

    @property
    def markers(self) -> tuple[str, ...]:
        """Strings that must reach `push` even where they are special tokens."""
        reasoning, tool = self.reasoning_format, self.tool_format
        return (
            *((reasoning.opener, reasoning.closer) if reasoning else ()),
            *(tool.openers + tool.markers if tool else ()),
        )

    def push(self, text: str) -> tuple[Part, ...]:
        """The further parts that this text completes."""
        assert not self._scan.is_ended, "push after finish"
        if self._passing is not None:
            kind, held = self._passing
            if not held.search(text):
                return (kind(text),) if text else ()
        self._scan.feed(text)
        return self._advance()

    def finish(self) -> tuple[Part, ...]:
        """What was held back."""
        self._scan.is_ended = True
        if self._passing is not None and self._passing[1] is _NOTHING:
            return ()
        return self._advance()

    def _advance(self) -> tuple[Part, ...]:
        self._passing = None
        next(self._steps, None)
        self._parts += self._calls.take()
        parts, self._parts = self._parts, []
        return join_parts(parts) if len(parts) > 1 else tuple(parts)

    def _read_answer(self) -> Steps[None]:
        if self.reasoning_format is not None:
            yield from self._read_reasoning(self.reasoning_format)
        if self.tool_format is not None:
            yield from self._read_content(self.tool_format)
        while True:
            self._scan.position = len(self._scan.text)
            self._emit(TextPart)
            if self._scan.is_ended:
                return
            self._passing = (TextPart, _NOTHING)
            yield

    def _read_reasoning(self, form: ReasoningFormat) -> Steps[None]:
        scan = self._scan
        yield from scan.skip_space()
        # A model may open the block once more.
        if not (yield from scan.has(form.opener)) and not self._starts_in_reasoning:
            return
        yield from scan.skip_space()
        scan.commit()
        yield from self._emit_until((form.closer,), ReasoningPart)
        yield from scan.has(form.closer)
        yield from scan.run(_LINE_BREAKS, lambda _: None)
        scan.commit()

    def _read_content(self, form: ToolFormat) -> Steps[None]:
        scan = self._scan
        yield from scan.skip_space()
        char = yield from scan.peek()
        is_call = char != "" and char in form.starts
        while is_call or (yield from self._emit_until(form.openers, TextPart)):
            is_call = False
            try:
                yield from form.read(scan, self._calls)
                yield from scan.skip_space()
                self._calls.accept()
            except Mismatch:
                self._calls.reject()
                self._parts += self._calls.take()
                self._emit(TextPart)

    def _emit_until(self, markers: Sequence[str], kind: type[TextPart] | type[ReasoningPart]) -> Steps[bool]:
        """Emits text up to the first of `markers`, space before it left out; False where none comes."""
        scan = self._scan
        pattern = re.compile("|".join(re.escape(marker) for marker in markers))
        held = re.compile("|".join([rf"[{_SPACE}]\Z", *(re.escape(marker[0]) for marker in markers)]))
        while True:
            text = scan.text
            found = pattern.search(text, scan.position)
            if found is None and scan.is_ended:
                scan.position = len(text)
                self._emit(kind)
                return False
            end = found.start() if found else _partial_start(text, scan.position, markers)
            body_end = scan.position + len(text[scan.position : end].rstrip(_SPACE))
            if body_end > scan.position:
                self._parts += self._calls.take()
                scan.position = body_end
                self._emit(kind)
                if body_end == len(text):
                    self._passing = (kind, held)
            scan.position = end
            if found:
                return True
            yield

    def _emit(self, kind: Callable[[str], TextPart] | Callable[[str], ReasoningPart]) -> None:
        """All that was read and not yet accepted, as a part."""
        raw = self._scan.take_raw()
        if raw:
            self._parts.append(kind(raw))


def _partial_start(text: str, start: int, markers: Iterable[str]) -> int:
    """Where a beginning of one of `markers` stands at the end of `text`; its length where none does."""
    longest = max(map(len, markers))
    for index in range(max(start, len(text) - longest + 1), len(text)):
        if any(marker.startswith(text[index:]) for marker in markers):
            return index
    return len(text)


def parser_for(
    chat_template: str | None,
    tools_given: bool,
    *,
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    starts_in_reasoning: bool = False,
    stream_arguments: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> PartParser:
    """A parser for one answer. A format is a name, "none", or "auto": by the markers in the chat
    template. Tool calls are looked for only where the request gives tools. An unknown name is a ConfigError."""
    tool = choose_tool_format(chat_template, tool_format)
    return PartParser(
        tool if tools_given else None,
        choose_reasoning_format(chat_template, reasoning_format),
        starts_in_reasoning=starts_in_reasoning,
        stream_arguments=stream_arguments,
        tools=tools,
    )


def choose_tool_format(chat_template: str | None, name: str = "auto") -> ToolFormat | None:
    if name != "auto":
        return _named(name, TOOL_FORMATS, "tool format")
    marks = chat_template or ""
    return next((f for f in TOOL_FORMATS.values() if any(mark in marks for mark in f.template_marks)), None)


def choose_reasoning_format(chat_template: str | None, name: str = "auto") -> ReasoningFormat | None:
    if name != "auto":
        return _named(name, REASONING_FORMATS, "reasoning format")
    marks = chat_template or ""
    return next((f for f in REASONING_FORMATS.values() if f.opener in marks or f.closer in marks), None)


def _named(name: str, formats: Mapping[str, _Format], what: str) -> _Format | None:
    if name == "none":
        return None
    if name not in formats:
        allowed = ["auto", "none", *formats]
        raise ConfigError(f"unknown {what} '{name}'.{nearest(name, allowed)} Known: {', '.join(allowed)}")
    return formats[name]
