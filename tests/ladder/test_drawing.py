from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.ladder.drawing import Point, flow, scatter, ticks


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
    circles = [element for element in root.iter() if element.tag == "circle"]
    assert len(circles) == len(given_points)
    for circle in circles:
        assert 52 <= float(circle.get("cx")) <= 336
        assert 12 <= float(circle.get("cy")) <= 208


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [(0, 10, 5, [0, 2, 4, 6, 8, 10]), (0.97, 1.01, 4, [0.97, 0.98, 0.99, 1.0, 1.01]), (0, 950, 4, [0, 500])],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    assert ticks(low, high, count) == pytest.approx(expected)
