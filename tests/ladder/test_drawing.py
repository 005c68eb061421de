from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.ladder.drawing import Point, bars, flow, scatter, ticks


def rungs(*statuses: str) -> list[dict[str, str]]:
    return [{"name": f"r{n}", "title": f"<rung> & {n}", "status": status} for n, status in enumerate(statuses)]


def classes(svg: str) -> list[str]:
    return [element.get("class") or "" for element in ElementTree.fromstring(svg).iter()]


def test_the_flow_leads_back_from_what_is_not_accepted() -> None:
    svg = flow(rungs("base", "rejected", "accepted", "too little data", "skipped"), "r2")
    found = classes(svg)
    assert found.count("arrow") == 4
    assert [name for name in found if name.startswith("back")] == ["back bad", "back open"]
    assert [name for name in found if name.startswith("box")] == [
        "box good",
        "box bad",
        "box good chosen",
        "box open",
        "box off",
    ]
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter()]
    assert "acceptable" in texts
    assert "no: step back" in texts
    assert "<rung> & 3" in texts


def test_a_flow_of_one() -> None:
    assert classes(flow(rungs("not good enough"), None)).count("arrow") == 0


points = st.builds(
    Point,
    st.just("1"),
    st.just("<title>"),
    st.sampled_from(["good", "bad"]),
    st.floats(0, 1e12),
    st.floats(0, 1.2),
    st.floats(-5, 1),
    st.floats(0, 5),
)


@given(st.lists(points, min_size=1, max_size=5))
def test_any_points_are_drawn_inside_the_plot(given_points: list[Point]) -> None:
    root = ElementTree.fromstring(scatter(given_points, "MB & more", 0.99))
    labels = [element.text for element in root.iter("text") if "number" in element.get("class", "")]
    assert ",".join(labels).count("1") == len(given_points)  # marks that would cover each other are one
    marks = [element for element in root.iter("rect") if "dot" in element.get("class", "")]
    assert len(marks) == len(labels)
    for mark in marks:
        assert 52 <= float(mark.get("x")) + float(mark.get("width")) / 2 <= 336
        assert 12 <= float(mark.get("y")) + 9 <= 208


def test_points_at_one_place_are_one_mark() -> None:
    at = [(1, "good", 100.0, 0.99), (2, "bad", 101.0, 0.98), (3, "good", 10.0, 0.99)]
    found = [Point(str(n), f"rung {n}", kind, x, y, y - 0.01, y + 0.01) for n, kind, x, y in at]
    root = ElementTree.fromstring(scatter(found, "MB", 0.5))
    assert [text.text for text in root.iter("text") if "number" in text.get("class", "")] == ["1,2", "3"]
    assert [mark.get("class") for mark in root.iter("rect")] == ["dot bad", "dot good"]
    assert [title.text for title in root.iter("title")] == ["rung 1; rung 2: 99.00%", "rung 3: 99.00%"]


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [(0, 10, 5, [0, 2, 4, 6, 8, 10]), (0.97, 1.01, 4, [0.97, 0.98, 0.99, 1.0, 1.01]), (0, 950, 4, [0, 500])],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    assert ticks(low, high, count) == pytest.approx(expected)


def test_a_bar_for_each_layer() -> None:
    drawn = bars([0.01, 0.2, 0.0, 0.1], [1, 3], "layer")
    root = ElementTree.fromstring(drawn)
    found = [(bar.get("class"), float(bar.get("height"))) for bar in root.iter("rect")]
    assert [kind for kind, _ in found] == ["bar rest", "bar kept", "bar rest", "bar kept"]
    heights = [height for _, height in found]
    assert heights[1] == max(heights)
    assert heights[3] == pytest.approx(heights[1] / 2, abs=0.1)
    assert min(heights) >= 1  # still to be seen
    assert "0.2000" in drawn
    assert bars([0.0, 0.0], [], "layer").count("<rect") == 2
