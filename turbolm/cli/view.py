"""An answer as markdown on a terminal, while it comes in."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import IO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from turbolm.answer import Answer
from turbolm.cli.plain_view import printable, tool_call
from turbolm.types import Part, ReasoningPart, TextPart

_INTERVAL = 0.06  # seconds between two drawings
_REASONING_LINES = 6  # shown while the model thinks
_PARSER = MarkdownIt().enable("strikethrough").enable("table")


class LiveRegion:
    """Lines at the bottom of the screen that are redrawn in place: only those from the first changed one on,
    in one write, so nothing flickers. They must fit the screen."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._lines: list[str] = []
        self._width = 0

    def show(self, lines: Sequence[str], width: int, above: str = "") -> None:
        """Replaces the region by `lines`, after printing `above` (whole lines, kept forever) in front of it."""
        common = 0
        if not above and width == self._width:
            pairs = zip(self._lines, lines, strict=False)
            common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._lines), len(lines)))
        if common == len(lines) == len(self._lines) and not above:
            return
        # After a change of the window's width, the terminal may have wrapped our lines.
        rows = sum(max(1, math.ceil(Text.from_ansi(line).cell_len / width)) for line in self._lines[common:])
        up = f"\x1b[{rows}A\r" if rows else ""
        tail = "".join(f"{line}\n" for line in lines[common:])
        self._out.write(f"{up}\x1b[J{above}{tail}")
        self._out.flush()
        self._lines, self._width = list(lines), width


class _LeftHeading(Heading):
    """Headings at the left margin."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold underline" if self.tag == "h1" else "bold")
        yield self.text


class _Code(CodeBlock):
    """Code without padding above and below."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)
        yield Padding(code, (0, 0, 0, 2))


class _Markdown(Markdown):
    elements = {**Markdown.elements, "heading_open": _LeftHeading, "fence": _Code, "code_block": _Code}  # noqa: RUF012 (as in the base class)


def finished_length(markdown: str) -> int:
    """How much of a growing markdown text is final: all blocks but the last."""
    starts = [token.map[0] for token in _PARSER.parse(markdown) if token.level == 0 and token.map]
    if len(starts) < 2:
        return 0
    return sum(len(line) for line in markdown.splitlines(keepends=True)[: starts[-1]])


class MarkdownView:
    """Markdown on a terminal. Finished blocks are printed once and scroll away like any text; only the
    last block is redrawn, cut to its end where it is higher than the screen, and printed whole when done."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._region = LiveRegion(self._console.file)
        self._index = self._offset = 0  # the part, and the place in it, up to which all is printed
        self._printed = False
        self._drawn = 0.0
        self._cost = 0.0  # seconds that the last drawing took
        self._timer: asyncio.TimerHandle | None = None
        self._reasoning_since = 0.0
        self._console.show_cursor(False)

    def update(self, answer: Answer) -> None:
        """Draws soon: some 16 times a second, less often where drawing is slow."""
        if self._timer is None:
            wait = max(0.0, self._drawn + max(_INTERVAL, 4 * self._cost) - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._draw, answer)

    def finish(self, answer: Answer, note: str | None = None) -> None:
        """Prints the rest and a dim `note`, and gives the screen back."""
        if self._timer is not None:
            self._timer.cancel()
        above = "".join(self._commit(answer.parts, len(answer.parts)))
        if note:
            above += self._spaced(self._render(Text(printable(note), style="dim italic")))
        self._region.show((), self._console.width, above + "\n")
        self._console.show_cursor(True)

    def _draw(self, answer: Answer) -> None:
        self._timer = None
        began = time.monotonic()
        above = "".join(self._commit(answer.parts, len(answer.parts) - 1))
        live: list[str] = []
        if answer.parts:
            part = answer.parts[-1]
            if isinstance(part, TextPart):
                cut = finished_length(part.text[self._offset :])
                above += self._block(part.text[self._offset : self._offset + cut])
                self._offset += cut
                live = self._render(_markdown(part.text[self._offset :])).strip("\n").split("\n")
            elif isinstance(part, ReasoningPart):
                self._reasoning_since = self._reasoning_since or began
                text = Padding(Text(printable(part.text), style="dim italic"), (0, 0, 0, 2))
                live = self._render(text).rstrip("\n").split("\n")[-_REASONING_LINES:]
            else:
                live = [self._render(Text(f"→ {tool_call(part)}", style="cyan", overflow="ellipsis", no_wrap=True))]
                live = live[0].rstrip("\n").split("\n")
        gap = [""] if self._printed or above else []
        height = max(1, self._console.height - 4)
        self._region.show([*gap, *live[-height:], "", self._status(answer)], self._console.width, above)
        self._drawn = time.monotonic()
        self._cost = self._drawn - began

    def _status(self, answer: Answer) -> str:
        if not answer.num_tokens:
            text = "reading… ctrl-C stops"
        else:
            text = f"{answer.num_tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, ctrl-C stops"
        return self._render(Text(text, style="dim", no_wrap=True, overflow="ellipsis")).rstrip("\n")

    def _commit(self, parts: Sequence[Part], count: int) -> list[str]:
        """What has to be printed for the first `count` parts to be there in full."""
        printed = []
        while self._index < count:
            part = parts[self._index]
            if isinstance(part, TextPart):
                printed.append(self._block(part.text[self._offset :]))
            elif isinstance(part, ReasoningPart):
                printed.append(self._fold(part))
            else:
                printed.append(self._spaced(self._render(Text(f"→ {tool_call(part)}", style="cyan"))))
            self._index, self._offset = self._index + 1, 0
        return printed

    def _block(self, markdown: str) -> str:
        return self._spaced(self._render(_markdown(markdown))) if markdown.strip() else ""

    def _fold(self, part: ReasoningPart) -> str:
        seconds = time.monotonic() - self._reasoning_since if self._reasoning_since else 0.0
        self._reasoning_since = 0.0
        if not part.text.strip():
            return ""
        text = f"thought for {seconds:.1f} s, {len(part.text.split())} words (/reasoning shows them)"
        return self._spaced(self._render(Text(text, style="dim italic")))

    def _spaced(self, text: str) -> str:
        """With an empty line between blocks."""
        gap = "\n" if self._printed else ""
        self._printed = True
        return gap + text.strip("\n") + "\n"

    def _render(self, item: RenderableType) -> str:
        with self._console.capture() as capture:
            self._console.print(item)
        return capture.get()


def _markdown(text: str) -> Markdown:
    return _Markdown(printable(text), code_theme="ansi_dark", inline_code_theme="ansi_dark")
