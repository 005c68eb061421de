from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from turbolm.text.stop import StopStrings


def run(stops: list[str], pieces: list[str], include_stop: bool = False) -> tuple[str, str | None, StopStrings]:
    cutter = StopStrings(stops, include_stop)
    emitted, matched = "", None
    for piece in pieces:
        text, matched = cutter.push(piece)
        emitted += text
        if matched is not None:
            return emitted, matched, cutter
    return emitted + cutter.finish(), None, cutter


def first_stop(stops: list[str], text: str) -> tuple[int, str] | None:
    """(end, stop) by definition: ends first, then longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


SMALL = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=5)


@given(STOPS, st.lists(SMALL, max_size=6), st.booleans())
def test_finds_what_the_definition_says_however_the_text_is_cut(stops, pieces, include_stop):
    text = "".join(pieces)
    emitted, matched, cutter = run(stops, pieces, include_stop)
    expected = first_stop(stops, text)
    if expected is None:
        assert (emitted, matched, cutter.matched) == (text, None, None)
        return
    end, stop = expected
    assert (matched, cutter.matched, cutter.start, cutter.end) == (stop, stop, end - len(stop), end)
    assert emitted == text[: end if include_stop else end - len(stop)]


@given(STOPS, st.lists(SMALL, max_size=6))
def test_holds_back_only_what_may_become_a_stop(stops, pieces):
    cutter = StopStrings(stops)
    text = emitted = ""
    for piece in pieces:
        text += piece
        new, matched = cutter.push(piece)
        emitted += new
        if matched is not None:
            return
        held = text[len(emitted) :]
        assert text == emitted + held
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted", "matched"),
    [
        (["\n\n"], ["one\n", "\ntwo"], "one", "\n\n"),
        (["</s>", "User:"], ["hi <", "/", "s", "> User:"], "hi ", "</s>"),
        (["abcd", "bc"], ["xabc", "d"], "xa", "bc"),  # ends first
        (["bc", "abc"], ["xa", "bc"], "x", "abc"),  # ends there too, and is longer
        (["aab"], ["aaaab"], "aa", "aab"),
        (["停止", "🛑"], ["你好停", "止"], "你好", "停止"),
        (["STOP"], ["no ST", "OP"], "no ", "STOP"),
        (["x]"], ["[x", "}x]"], "[x}", "x]"),
    ],
)
def test_examples(stops, pieces, emitted, matched):
    assert run(stops, pieces)[:2] == (emitted, matched)


def test_stop_is_kept_on_demand():
    assert run(["END"], ["a E", "ND b"], include_stop=True)[0] == "a END"


def test_nothing_comes_after_a_stop():
    cutter = StopStrings(["."])
    assert cutter.push("a.b") == ("a", ".")
    assert cutter.push("c") == ("", ".")
    assert cutter.finish() == ""
    assert (cutter.start, cutter.end) == (1, 2)


def test_without_stops_text_passes():
    cutter = StopStrings([])
    assert cutter.push("anything") == ("anything", None)
    assert cutter.finish() == ""


def test_a_partial_stop_comes_out_at_the_end():
    cutter = StopStrings(["STOP"])
    assert cutter.push("a STO") == ("a ", None)
    assert cutter.finish() == "STO"
    assert cutter.finish() == ""


def test_many_and_long_stops():
    stops = [f"<stop-{number}>" for number in range(500)] + ["a" * 20_000]
    text = ["a"] * 19_999 + ["b <stop-", "499", "> tail"]
    emitted, matched, cutter = run(stops, text)
    assert matched == "<stop-499>"
    assert emitted == "a" * 19_999 + "b "
    assert cutter.start == len(emitted)
