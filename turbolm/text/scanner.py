"""Reading text that arrives in pieces with straight-line code.

A reader is a generator: it takes what it needs from a `Scanner` and yields where the text at hand
does not decide; the owner feeds more text and resumes it. What a reader does must depend on the text
alone, never on where it was cut: each method below reads all or nothing, or character by character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]*")


class Mismatch(Exception):  # noqa: N818 - an outcome that the parser handles, never an error that leaves it
    """The text is not in the format that a reader reads."""


class Scanner:
    """The text not read yet, and what was read since the last `commit`."""

    def __init__(self, text: str = "", is_ended: bool = False) -> None:
        self.text = text
        self.position = 0  # what lies before it in `text` is read
        self.is_ended = is_ended
        self._mark = 0  # text[_mark:position] belongs to `_raw`
        self._raw: list[str] = []

    def feed(self, text: str) -> None:
        if self.position > self._mark:
            self._raw.append(self.text[self._mark : self.position])
        self.text = self.text[self.position :] + text
        self.position = self._mark = 0

    def commit(self) -> None:
        """What was read is accepted."""
        self._raw.clear()
        self._mark = self.position

    def take_raw(self) -> str:
        """What was read since the last commit, verbatim; commits."""
        self._raw.append(self.text[self._mark : self.position])
        raw = "".join(self._raw)
        self.commit()
        return raw

    def fill(self, size: int) -> Steps[None]:
        """Waits until `size` unread characters are there, or the end."""
        while len(self.text) - self.position < size and not self.is_ended:
            yield

    def peek(self) -> Steps[str]:
        """The next character, unread; empty at the end."""
        yield from self.fill(1)
        return self.text[self.position : self.position + 1]

    def step(self, sink: Sink, size: int = 1) -> None:
        """Reads `size` characters, known to be there, into `sink`."""
        piece = self.text[self.position : self.position + size]
        self.position += size
        sink(piece)

    def has(self, literal: str) -> Steps[bool]:
        """Reads `literal` if it comes next."""
        while not self.text.startswith(literal, self.position):
            if self.is_ended or not literal.startswith(self.text[self.position : self.position + len(literal)]):
                return False
            yield
        self.position += len(literal)
        return True

    def expect(self, literal: str) -> Steps[None]:
        """Reads `literal`, or raises Mismatch."""
        if not (yield from self.has(literal)):
            raise Mismatch

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Steps[None]:
        """Reads the characters that `pattern` (a character class, starred) matches, piece by piece."""
        while True:
            match = pattern.match(self.text, self.position)
            assert match is not None
            if match[0]:
                self.step(sink, len(match[0]))
            if self.position < len(self.text) or self.is_ended:
                return
            yield

    def take(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Like `run`, as one string; raises Mismatch where there is none."""
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        if not pieces:
            raise Mismatch
        return "".join(pieces)

    def skip_space(self) -> Steps[None]:
        yield from self.run(SPACE, lambda _: None)

    def until(self, literal: str) -> Steps[str]:
        """All up to `literal`, which is read too; raises Mismatch where it never comes."""
        pieces: list[str] = []
        while (found := self.text.find(literal, self.position)) < 0:
            # All but a possible beginning of `literal`.
            self.step(pieces.append, max(0, len(self.text) - len(literal) + 1 - self.position))
            if self.is_ended:
                raise Mismatch
            yield
        self.step(pieces.append, found - self.position)
        self.position += len(literal)
        return "".join(pieces)
