"""An answer as plain text while it comes in: all that a pipe, or a terminal without colours, needs."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Protocol, TextIO

from turbolm.answer import Answer, ChatEngine
from turbolm.cli.conversation import Conversation
from turbolm.types import Part, ReasoningPart, ToolCallPart

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class View(Protocol):
    """Shows an answer while it comes in."""

    def update(self, answer: Answer) -> None: ...


async def stream_answer(engine: ChatEngine, conversation: Conversation, answer: Answer, view: View) -> None:
    """Asks for the next answer and shows it as it comes. Leaving early cancels it."""
    stream = engine.chat(conversation.messages, conversation.params)
    async with contextlib.aclosing(stream):  # type: ignore[type-var]  # both engines give async generators
        async for output in stream:
            answer.push(output)
            view.update(answer)


def printable(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return _CONTROL.sub("", text)


def tool_call(part: ToolCallPart) -> str:
    """`name({"city": "Oslo"})`"""
    return printable(f"{part.name or 'tool'}({part.arguments})")


class PlainView:
    """Text as it comes, without any control characters of our own; reasoning goes to stderr."""

    def __init__(self, out: TextIO | None = None, aside: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._aside = aside or sys.stderr
        self._index = self._offset = 0  # the part, and the place in it, up to which all is written
        self._ends_line = True

    def update(self, answer: Answer) -> None:
        """Writes what is new; tool calls when they are whole."""
        while self._index < len(answer.parts):
            part, is_last = answer.parts[self._index], self._index == len(answer.parts) - 1
            if not isinstance(part, ToolCallPart) or not is_last:
                self._write(part)
            if is_last:
                return
            self._next_part(part)

    def finish(self, answer: Answer, note: str | None = None) -> None:
        """Writes the rest and ends the line; `note` goes to stderr."""
        self.update(answer)
        for part in answer.parts[self._index :]:
            self._write(part)
            self._next_part(part)
        if note:
            self._aside.write(note + "\n")

    def _write(self, part: Part) -> None:
        text = tool_call(part) if isinstance(part, ToolCallPart) else part.text
        new = text[self._offset :]
        self._offset = len(text)
        if new:
            out = self._stream(part)
            out.write(printable(new) if out.isatty() else new)
            out.flush()
            self._ends_line = new.endswith("\n")

    def _next_part(self, part: Part) -> None:
        if not self._ends_line:
            self._stream(part).write("\n")
            self._stream(part).flush()
        self._index, self._offset, self._ends_line = self._index + 1, 0, True

    def _stream(self, part: Part) -> TextIO:
        return self._aside if isinstance(part, ReasoningPart) else self._out
