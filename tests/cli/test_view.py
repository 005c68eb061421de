from __future__ import annotations

import asyncio
import io
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from turbolm.answer import Answer
from turbolm.cli.plain_view import printable
from turbolm.cli.view import LiveRegion, MarkdownView, finished_length
from turbolm.types import Output, ReasoningPart, TextPart, ToolCallPart, Usage

WIDTH, HEIGHT = 40, 10


class Screen(io.StringIO):
    """A terminal that understands what the views send: cursor up, carriage return, erase below."""

    def __init__(self):
        super().__init__()
        self.rows = [""]
        self.row = 0
        self.worst = 0  # furthest that the cursor went up

    def write(self, text):
        for token in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\|[^\x1b]", text):
            if token == "\n":
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif token.endswith("A") and token[0] == "\x1b":
                self.row -= int(token[2:-1])
                self.worst = max(self.worst, len(self.rows) - self.row)
            elif token == "\x1b[J":
                self.rows[self.row :] = [""]
            elif token[0] != "\x1b" and token != "\r":
                self.rows[self.row] += token
        return len(text)

    def isatty(self):
        return True

    @property
    def text(self):
        return "\n".join(row.rstrip() for row in self.rows).strip("\n")


lines = st.lists(st.text("ab ", max_size=8), max_size=6)


@given(st.lists(st.tuples(lines, lines), max_size=6))
def test_region_shows_what_was_printed_above_and_its_last_lines(shows):
    screen = Screen()
    region = LiveRegion(screen)
    above = []
    for new, printed in shows:
        above += printed
        region.show(new, WIDTH, "".join(f"{line}\n" for line in printed))
        assert screen.rows == [*above, *new, ""]


def test_region_writes_only_what_changed():
    screen = Screen()
    region = LiveRegion(screen)
    region.show(["one", "two"], WIDTH)
    out = io.StringIO()
    region._out = out
    region.show(["one", "two, longer"], WIDTH)
    assert "one" not in out.getvalue()
    region.show(["one", "two, longer"], WIDTH)
    assert out.getvalue().count("longer") == 1


def show(parts, steps=1, note=None):
    """The screen after an answer that came part by part, each in `steps` pieces."""
    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=WIDTH, height=HEIGHT, highlight=False)

    async def run():
        view, answer = MarkdownView(console), Answer()
        for part in parts:
            for piece in pieces(part, steps):
                answer.push(Output("", parts=(piece,)))
                view._draw(answer)
        view.finish(answer, note)

    asyncio.run(run())
    return screen


def pieces(part, steps):
    if isinstance(part, ToolCallPart):
        return [part]
    size = max(1, len(part.text) // steps)
    return [type(part)(part.text[start : start + size]) for start in range(0, len(part.text), size)]


MARKDOWN = "# Head\n\nSome *text*.\n\n- one\n- two\n\n```\ncode\n```\n\nLast."


def test_streamed_markdown_looks_like_markdown_shown_at_once():
    assert show([TextPart(MARKDOWN)], 30).text == show([TextPart(MARKDOWN)]).text
    assert "Some text." in show([TextPart(MARKDOWN)]).text


def test_answers_higher_than_the_screen_are_kept_whole_and_once():
    code = "```\n" + "".join(f"line {n}\n" for n in range(50)) + "```\n\nend"
    for text in (code, "".join(f"- line {n}\n" for n in range(50))):
        screen = show([TextPart(text)], 80)
        assert re.findall(r"line (\d+)", screen.text) == [str(n) for n in range(50)]
        assert screen.worst <= HEIGHT  # the cursor never left the screen


def test_reasoning_is_folded_and_tool_calls_are_shown():
    parts = [ReasoningPart("Let me think."), TextPart("Answer"), ToolCallPart(0, '{"a": 1}', "id", "look")]
    text = show(parts, 3, note="stopped").text
    assert "Let me think" not in text
    assert re.search(r"thought for .* 3 words", text)
    assert text.index("Answer") < text.index('look({"a": 1})') < text.index("stopped")


def test_a_model_cannot_steer_the_terminal():
    screen = show([TextPart("safe\x1b[2Jtext\x07")])
    assert "\x1b[2J" not in screen.getvalue()
    assert "\x07" not in printable("a\x07\x9b1A\tb\n")
    assert printable("a\tb\n") == "a\tb\n"


@given(st.text("ab`*-#\n 1.>|", max_size=60))
def test_finished_blocks_stay_finished(text):
    """Text that was printed for good is never changed by what follows."""
    size = finished_length(text)
    assert 0 <= size <= len(text)
    assert text[:size].endswith("\n") or size == 0


def test_answer_counts_and_tells_why_it_ended():
    answer = Answer()
    answer.push(Output("", token_ids=(1, 2), parts=(TextPart("a"),)))
    answer.push(Output("", token_ids=(3,), parts=(TextPart("b"),)))
    assert (answer.text, answer.num_tokens) == ("ab", 3)
    answer.push(Output("", token_ids=(4,), finish_reason="length", usage=Usage(96, 4)))
    assert "context 100 of 100" in answer.statistics(100)
    assert "/reset" in (answer.ending(100) or "")
    assert "max_tokens" in (answer.ending(1000) or "")
    answer.finish_reason = "stop"
    assert answer.ending(100) is None
