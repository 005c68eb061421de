"""An answer as a row of items (reasoning, text, tool calls) in the order in which the model wrote them, for the
APIs whose events tell where each begins and ends."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from turbolm.types import Part, TextPart, ToolCallPart, join_parts

Change = Literal["begin", "grow", "end"]


@dataclass(slots=True)
class Item:
    """What the model wrote without a change of kind; `name` is the function's, in a call."""

    kind: Literal["reasoning", "text", "call"]
    index: int  # among the answer's items
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def text(self) -> str:
        """Of a call, the JSON of its arguments."""
        return "".join(self.pieces)


class Items:
    """Sorts parts into items, as they come."""

    def __init__(self, *, one_call: bool = False) -> None:
        """`one_call`: further tool calls are left out."""
        self.all: list[Item] = []
        self._one_call = one_call
        self._open: tuple[type, int] | None = None  # the kind of the last item, and which call it is

    def take(self, parts: Iterable[Part]) -> Iterator[tuple[Change, Item, str]]:
        """What the parts change: items that begin, end, and grow by a text."""
        for part in join_parts(parts):
            is_call = isinstance(part, ToolCallPart)
            number = part.index if isinstance(part, ToolCallPart) else 0
            text = part.arguments if isinstance(part, ToolCallPart) else part.text
            if (self._one_call and number > 0) or (not text and not is_call):
                continue
            if self._open != (type(part), number):
                yield from self.finish()
                self._open = (type(part), number)
                self.all.append(self._item(part))
                yield "begin", self.all[-1], ""
            if text:
                self.all[-1].pieces.append(text)
                yield "grow", self.all[-1], text

    def finish(self) -> Iterator[tuple[Change, Item, str]]:
        """Ends the last item."""
        if self._open is not None:
            self._open = None
            yield "end", self.all[-1], ""

    def collect(self, parts: Iterable[Part]) -> list[Item]:
        """All items of a whole answer."""
        for _ in self.take(parts):
            pass
        return self.all

    def _item(self, part: Part) -> Item:
        if isinstance(part, ToolCallPart):
            return Item("call", len(self.all), part.name or "")
        return Item("text" if isinstance(part, TextPart) else "reasoning", len(self.all))
