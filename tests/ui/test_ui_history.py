from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.errors import RequestError
from turbolm.types import ReasoningPart, TextPart, ToolCallPart
from turbolm.ui.history import answer_rows, note, question, settled, text_of, to_messages


def said(text):
    return {"role": "assistant", "content": text}


def asked(text):
    return {"role": "user", "content": text}


def test_reasoning_tool_calls_and_notes_are_not_said_again():
    parts = (ReasoningPart("hm"), TextPart("Yes."), ToolCallPart(0, '{"a": 1}', "id", "look"))
    rows = [question("Is it?"), *answer_rows(parts, 1.234, True), note("Stopped."), question("Sure?")]
    assert to_messages(rows, "Be kind.") == [
        {"role": "system", "content": "Be kind."},
        asked("Is it?"),
        said("Yes."),
        asked("Sure?"),
    ]
    assert to_messages([question("x")], "  ") == [asked("x")]


def test_a_question_without_an_answer_is_left_out():
    rows = [
        question("one"),
        note("This didn't work:", "busy"),
        question("two"),
        said("2"),
        said("!"),
        question("three"),
    ]
    assert to_messages(rows) == [asked("two"), said("2!"), asked("three")]


def test_content_as_the_page_sends_it():
    row = {"role": "user", "metadata": None, "options": None, "content": [{"type": "text", "text": "a"}, "b"]}
    assert to_messages([row]) == [asked("ab")]
    row["content"] = [{"type": "file", "file": {"path": "x.png"}}]
    with pytest.raises(RequestError, match="takes text only"):
        to_messages([row])


def test_growing_reasoning_is_open_and_finished_reasoning_is_folded():
    growing = answer_rows([ReasoningPart("hm")], 0.5, False)
    assert growing[0]["metadata"] == {"title": "Thinking", "status": "pending"}
    folded = answer_rows([ReasoningPart("hm"), TextPart("Yes")], 0.51, False)
    assert folded[0]["metadata"] == {"title": "Thoughts", "status": "done", "duration": 0.5}
    assert (text_of(folded[1]), folded[1]["metadata"]) == ("Yes", None)
    assert answer_rows([ReasoningPart("\n"), TextPart(" ")], 0, True) == []


def test_a_stopped_answer_leaves_nothing_pending():
    rows = settled([question("a"), *answer_rows([ReasoningPart("hm")], 0, False)])
    assert rows[-1]["metadata"]["status"] == "done"
    before_first = settled([question("a")])
    assert "Stopped" in text_of(before_first[-1])
    assert to_messages(before_first) == [asked("a")]


def test_errors_are_text_not_markup():
    assert "<b>" not in note("This didn't work:", "model '<b>' isn't here")["content"][0]["text"]


@given(st.lists(st.builds(lambda r, t: {"role": r, "content": t}, st.sampled_from(["user", "assistant"]), st.text())))
def test_roles_alternate(rows):
    roles = [message["role"] for message in to_messages(rows)]
    assert all(a != b for a, b in itertools.pairwise(roles))
    assert not rows or roles[-1] == rows[-1]["role"]
