"""Server-sent events, however their bytes are cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.errors import EngineError
from turbolm.events import EventReader

EVENTS = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "é\n", "data: [DONE]")]
STREAM = b": keep-alive\n\nevent: x\r\n" + b"".join(
    b"data: " + json.dumps(event, ensure_ascii=False).encode() + ending
    for event, ending in zip(EVENTS, (b"\n\n", b"\r\n\r\n", b"\n\n"), strict=True)
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_any_cut_gives_the_same_events(cuts):
    reader = EventReader()
    places = [0, *sorted(cuts), len(STREAM)]
    found = [event for a, b in itertools.pairwise(places) for event in reader.read(STREAM[a:b])]
    assert found == EVENTS and not reader.is_done


def test_what_follows_the_end_is_dropped():
    reader = EventReader()
    assert list(reader.read(b'data: {"a": 1}\n\ndata: [DONE]\n\ndata: {"b": 2}\n\n')) == [{"a": 1}]
    assert reader.is_done and list(reader.read(b"data: broken\n\n")) == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'data: {"error": {"message": "no memory"}}\n', "the server failed: no memory"),
        (b"data: {broken\n", "isn't JSON: {broken"),
        (b"data: \xff\n", "isn't JSON"),
        (b"data: [1]\n", "isn't an event"),
    ],
)
def test_errors_end_the_stream_after_what_came_before(data, error):
    events = EventReader().read(b'data: {"a": 1}\n' + data)
    assert next(events) == {"a": 1}
    with pytest.raises(EngineError, match=error):
        next(events)
