"""The report as a reader and a server meet it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import read_item
from turbolm.ladder.climb import Climb
from turbolm.ladder.config import LadderConfig
from turbolm.ladder.page import render, write_page
from turbolm.ladder.recommendation import read_recommendation
from turbolm.ladder.report import Run, make_report, write_json
from turbolm.ladder.subject import Subject
from turbolm.ladder.table import print_report, shortcomings

FLOW = ("base", "kv=int4", "weights=int8", "weights=int8+kv=int4")
NASTY = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture
def found(climb, solved) -> Climb:
    items = [*solved(30), read_item({"prompt": "x", "reference": NASTY, "id": NASTY}, 99)]
    return climb(items, FLOW)[0]


@pytest.fixture
def report(found: Climb):
    return report_of(found)


def report_of(found: Climb, **more):
    run = Run(
        subject=Subject("null", "null", is_packed=False), data="mine.jsonl", data_hash="0" * 64, num_held_out=0,
        config=LadderConfig(), exam=ExamConfig(max_tokens=8), engine=EngineConfig(threads=2, prefix_cache=False),
        memory=24_000_000_000, command=["turbolm", "ladder", "null", "--data", "mine.jsonl"],
    )  # fmt: skip
    return json.loads(json.dumps(make_report(replace(run, **more), found)))


def test_everything_needed_to_repeat_it(report) -> None:
    assert report["command"] == "turbolm ladder null --data mine.jsonl"
    assert report["model"] == {"name": "null", "fingerprint": "null"}
    assert report["data"]["sha256"] == "0" * 64
    assert report["settings"]["seed"] == 0
    assert report["engine"] == {"threads": 2, "prefix_cache": False}
    assert {"cpu", "turbolm", "python", "memory"} <= set(report["machine"])


def test_evidence_of_a_rejected_rung(report) -> None:
    rung = report["rungs"][1]
    assert rung["status"] == "rejected"
    assert rung["decision"]["comparison"]["losses"] == 30
    assert rung["scores"]["data"]["mean"] == 0
    assert len(rung["worst"]) == 8
    worst = rung["worst"][0]
    assert (worst["base"]["score"], worst["changed"]["score"]) == (1.0, 0.0)
    assert worst["base"]["text"] == worst["reference"]
    assert worst["question"].startswith("question ")
    assert report["rungs"][3]["cost"] is None


def test_what_fits_is_counted_in_the_memory_given(report) -> None:
    cost = report["rungs"][0]["cost"]
    assert [fit["context"] for fit in cost["fits"]] == [2048, 8192]
    assert cost["fits"][1]["sequences"] == int((24_000_000_000 - 1_000_000) * 0.9) // 1000 // 8192
    assert cost["memory_bytes"] == 1_000_000 + 4 * 4096 * 1000


def test_the_recommendation_can_be_served(report, found: Climb, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")
    read = read_recommendation(tmp_path / "report.json")
    assert (read.model, read.base, read.agreement) == ("null", "null", None)
    assert (read.model, read.options) == ("null", {"threads": 2, "prefix_cache": False})
    assert report["serve"]["command"] == "turbolm serve null --threads 2 --no-prefix-cache"
    better = report_of(replace(found, recommended=found.steps[3]))
    assert better["serve"]["options"] == {"threads": 2, "prefix_cache": False, "weights": "int8", "kv": "int4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "can't read the report"),
        ("[]", "is no report of this version"),
        ('{"format": "turbolm ladder 0"}', "is no report of this version"),
        ('{"format": "turbolm ladder 1", "serve": null}', "choose a larger model"),
        ('{"format": "turbolm ladder 1", "serve": {"model": 1}}', "is damaged"),
    ],
)
def test_reports_that_cannot_be_served(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_recommendation(tmp_path / "report.json")
    assert message in str(error.value)


class Page(HTMLParser):
    """Tags, links and text; complains where tags aren't closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_it_all_and_loads_nothing(report, tmp_path: Path) -> None:
    write_page(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import", text)
    assert page.tags.count("svg") == 3  # the flow, quality over memory and over speed
    assert {"del", "ins"} <= set(page.tags)
    for shown in ("Recommended: base", "KV int4", "rejected", "skipped", "turbolm serve null", "mine.jsonl", "0" * 64):
        assert shown in page.text
    assert NASTY not in text
    assert len(text) < 200_000


def test_the_page_of_a_base_that_is_not_good_enough(climb, solved) -> None:
    items = [read_item({"prompt": "x", "reference": "QQ"}, 1)]
    text = render(report_of(climb(items, FLOW, min_score="90%")[0]))
    page = Page(text)
    assert "No rung is recommended" in page.text
    assert "choose a larger model, or fine-tune" in page.text


def test_the_page_without_checks_costs_and_agreement(found: Climb) -> None:
    bare = tuple(replace(step, cost=None, answers={}) for step in found.steps)
    page = Page(render(report_of(replace(found, steps=bare, recommended=bare[0]))))
    assert page.tags.count("svg") == 1


def test_a_page_that_cannot_be_written(report, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't write"):
        write_page(report, tmp_path / "missing" / "report.html")


def test_drawings_are_well_formed(report) -> None:
    for svg in re.findall(r"<svg.*?</svg>", render(report), re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_table_in_a_pipe(report, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[1].split()[:2] == ["rung", "verdict"]
    row = next(line for line in lines if line.startswith("KV int4 "))
    assert "rejected" in row
    assert "0/30/1" in row
    assert printed.rstrip().endswith("turbolm serve null --threads 2 --no-prefix-cache")
    assert "\x1b" not in printed


def test_what_was_left_out_is_said(report) -> None:
    report["data"]["problems"] = [{"line": 3, "message": "too long"}]
    report["data"]["num_unasked"] = 5
    text = "\n".join(shortcomings(report))
    assert "1 items were left out (line 3): too long" in text
    assert "5 items weren't asked" in text
