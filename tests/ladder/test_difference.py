from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.ladder.difference import differences


def marked(segments) -> str:
    return "".join(f"[{text}]" if is_changed else text for is_changed, text in segments)


@pytest.mark.parametrize(
    ("a", "b", "left", "right"),
    [
        ("one two three", "one 2 three", "one [two] three", "one [2] three"),
        ("same", "same", "same", "same"),
        ("", "new", "", "[new]"),
        ("天空是蓝色", "天空是红色", "天空是[蓝]色", "天空是[红]色"),
        ("a b", "a b c", "a b", "a b[ c]"),
    ],
)
def test_words_that_differ_are_marked(a: str, b: str, left: str, right: str) -> None:
    ours, theirs = differences(a, b)
    assert (marked(ours), marked(theirs)) == (left, right)


texts = st.text(alphabet="ab \n你", max_size=30)


@given(texts, texts)
def test_nothing_is_lost(a: str, b: str) -> None:
    ours, theirs = differences(a, b)
    assert "".join(segment.text for segment in ours) == a
    assert "".join(segment.text for segment in theirs) == b
    unchanged = ["".join(s.text for s in side if not s.is_changed) for side in (ours, theirs)]
    assert unchanged[0] == unchanged[1]
    assert all(segment.text for segment in (*ours, *theirs))


def test_long_texts_take_no_time() -> None:
    start = time.monotonic()
    ours, _ = differences("start " + "a b " * 20_000, "start " + "c d " * 20_000)
    assert time.monotonic() - start < 2
    assert ours[0].text.startswith("start")
