"""The flow: who is accepted, who is rejected, who is skipped; and that nothing is asked twice."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError, EngineError, UserError
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import read_item
from turbolm.eval.probes import make_probes
from turbolm.ladder.climb import in_order, recommend
from turbolm.ladder.store import Store
from turbolm.llm import AsyncLLM

FLOW = ("base", "kv=int4", "weights=int8", "weights=int8+kv=int4")


def statuses(climb) -> dict[str, str]:
    return {step.rung.name: step.outcome.status for step in climb.steps}


def test_a_damaged_rung_is_rejected_and_what_includes_it_skipped(climb, solved) -> None:
    found, watcher = climb(solved(40), FLOW)
    assert statuses(found) == {
        "base": "base", "kv=int4": "rejected", "weights=int8": "too little data", "weights=int8+kv=int4": "skipped",
    }  # fmt: skip
    base, damaged = found.steps[:2]
    assert base.outcome.reason == "it scores 100.0%"
    assert "100.00% below the base's over 40 items" in damaged.outcome.reason
    assert damaged.outcome.decision.comparison.losses == 40
    assert damaged.outcome.agreement.kl > 1
    assert "includes KV int4, which was rejected" in found.steps[3].outcome.reason
    assert found.recommended is base
    assert [name for name, *_ in watcher.begun] == list(FLOW[:3])
    assert watcher.num_advanced == 120


def test_a_rung_like_the_base_is_accepted_where_there_are_enough_items(climb, solved) -> None:
    found, _ = climb(solved(330), ["base", "weights=int8"])
    assert statuses(found)["weights=int8"] == "accepted"
    assert found.recommended.rung.name == "weights=int8"  # of equal memory the last


def test_agreement_needs_fewer_items(climb, solved) -> None:
    found, _ = climb(solved(40), FLOW, metric="agreement")
    assert statuses(found)["weights=int8"] == "accepted"
    assert statuses(found)["kv=int4"] == "rejected"
    assert found.steps[2].outcome.agreement.num_identical == 40


def test_every_runs_what_would_be_skipped(climb, solved) -> None:
    found, _ = climb(solved(40), FLOW, every=True)
    assert statuses(found)["weights=int8+kv=int4"] == "rejected"


def test_probes_reject_but_never_accept(climb, solved) -> None:
    probes = [read_item(item.fields, 0, group="probe") for item in solved(30)]
    free = [read_item({"prompt": f"say {number}"}, number) for number in range(1, 13)]
    found, _ = climb([*free, *probes], ["base", "kv=int4"], metric="score")
    assert statuses(found)["kv=int4"] == "rejected"
    assert found.steps[1].outcome.reason.startswith("probes: ")
    alone, _ = climb(probes, ["base", "weights=int8"])
    assert statuses(alone)["weights=int8"] == "too little data"


def test_a_base_that_is_not_good_enough_ends_the_climb(climb) -> None:
    items = [read_item({"prompt": "x", "reference": "QQQ"}, 1)]
    found, _ = climb(items, FLOW, min_score="50%")
    assert statuses(found) == {"base": "not good enough"}
    assert "choose a larger model, or fine-tune" in found.steps[0].outcome.reason
    assert found.recommended is None


def test_a_base_that_solves_nothing_cannot_get_worse(climb) -> None:
    items = [read_item({"prompt": f"x{number}", "reference": "QQQ"}, number) for number in range(1, 20)]
    found, _ = climb(items, FLOW[:2])
    assert statuses(found)["kv=int4"] == "too little data"
    assert "the base solves none" in found.steps[1].outcome.reason


def test_a_rung_that_cannot_be_loaded_is_left_out(climb, solved) -> None:
    def load(model, engine):
        if engine.weights == "int8":
            raise ConfigError("no kernels for int8 here")
        return AsyncLLM("null", max_context=512)

    found, _ = climb(solved(5), ["base", "weights=int8", "kv=int8"], load=load)
    assert statuses(found)["weights=int8"] == "not served"
    assert found.steps[1].outcome.reason == "no kernels for int8 here"
    assert statuses(found)["kv=int8"] == "too little data"


def test_a_second_run_asks_nothing(climb, solved) -> None:
    first, _ = climb(solved(30), FLOW)
    second, again = climb(solved(30), FLOW)
    assert again.begun == []
    assert [step.answers for step in second.steps] == [step.answers for step in first.steps]
    assert second.steps[1].outcome == first.steps[1].outcome
    assert second.seconds == pytest.approx(first.seconds)


def test_further_items_and_rungs_go_on_from_there(climb, solved) -> None:
    climb(solved(20), FLOW[:2])
    found, watcher = climb(solved(25), FLOW)
    assert watcher.begun == [("base", 25, 20), ("kv=int4", 25, 20), ("weights=int8", 25, 0)]
    assert watcher.num_advanced == 5 + 5 + 25
    assert all(len(step.answers) == 25 for step in found.steps[:3])


@pytest.mark.parametrize("change", [{"exam": ExamConfig(max_tokens=7)}, {"engine": None}])
def test_other_options_ask_again(climb, solved, change) -> None:
    climb(solved(4), ["base"])
    if "engine" in change:
        change = {"engine": EngineConfig(prefix_cache=False)}
    assert climb(solved(4), ["base"], **change)[1].num_advanced == 4


def test_what_the_model_cannot_take_is_reported_by_line(climb, solved) -> None:
    items = [*solved(3), read_item({"prompt": "x" * 600}, 4)]
    with pytest.raises(UserError, match=r"1 items of the data can't be used.*\n  line 4: 608 tokens"):
        climb(items, ["base", "kv=int4"])
    exam = ExamConfig(max_tokens=8, keep_going=True)
    for _ in range(2):  # known the second time
        found, _ = climb(items, ["base", "kv=int4"], exam=exam)
        assert [problem.line for problem in found.problems] == [4]
        assert len(found.items) == 3
        assert found.num_unasked == 0


def test_probes_that_a_model_cannot_take_are_left_out(climb, solved) -> None:
    found, _ = climb([*solved(3), *make_probes(("tool call",), 2, 0, 10)], ["base"])
    assert [problem.line for problem in found.problems] == [0, 0]


def test_the_budget_limits_the_items(climb, solved, load_slow) -> None:
    """Each rung has a second, whatever is left; in that the slow model answers a few items."""
    found, _ = climb(solved(150), ["base", "weights=int8"], load=load_slow, budget="1s")
    assert 0 < len(found.items) < 150
    assert found.num_unasked == 150 - len(found.items)
    assert set(found.steps[1].answers) <= {item.key for item in found.items}
    again, watcher = climb(solved(150), ["base", "weights=int8"], load=load_slow, budget="1s")
    assert watcher.begun == []
    assert len(again.items) == len(found.items)


def test_the_engines_failure_for_one_item_counts_against_the_rung(climb, solved, monkeypatch) -> None:
    class Failing(AsyncLLM):
        def generate(self, prompt, params=None, **options):
            if isinstance(prompt, tuple) and prompt[-2:-1] == (ord("7"),):
                raise EngineError("no numbers")
            return super().generate(prompt, params, **options)

    def load(model, engine):
        kind = Failing if engine.weights == "int8" else AsyncLLM
        return kind("null", max_context=512)

    found, _ = climb(solved(20), ["base", "weights=int8"], load=load)
    failed = [answer for answer in found.steps[1].answers.values() if answer.error]
    assert {(answer.error, answer.score) for answer in failed} == {("no numbers", 0.0)}
    assert found.steps[1].outcome.decision.comparison.losses == len(failed) == 2
    healed, watcher = climb(solved(20), ["base", "weights=int8"], load=lambda *_: AsyncLLM("null", max_context=512))
    assert watcher.begun == [("weights=int8", 20, 18)]  # what failed is asked again
    assert healed.steps[1].outcome.decision.comparison.losses == 0


def test_items_of_all_groups_come_early() -> None:
    items = [
        read_item({"prompt": f"{g}{n}", "group": g}, n + 1) for g, count in (("a", 30), ("b", 3)) for n in range(count)
    ]
    order = in_order(items, 0)
    assert sorted(map(id, order)) == sorted(map(id, items))
    places = [number for number, item in enumerate(order) if item.group == "b"]
    assert places[0] < 8 < places[1] < 24 < places[2]
    assert [item.id for item in in_order(items, 0)] == [item.id for item in order]
    assert in_order(items, 1) != order


def test_recommendation_by_memory_or_speed(climb, solved) -> None:
    found, _ = climb(solved(40), FLOW, metric="agreement")
    base, _, other, _ = found.steps
    larger = replace(other, cost=replace(other.cost, weight_bytes=2_000_000, tokens_per_second_load=200.0))
    assert recommend([base, larger], "memory") is base
    assert recommend([base, larger], "speed") is larger


SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from turbolm.config import EngineConfig
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import read_item
from turbolm.ladder.climb import Climber
from turbolm.ladder.config import LadderConfig
from turbolm.ladder.cost import Cost
from turbolm.ladder.rungs import parse_rung
from turbolm.ladder.store import Store
from turbolm.ladder.subject import Subject
from turbolm.ladder.store import Store
from turbolm.llm import AsyncLLM

folder = Path(sys.argv[1])
asked = (folder / "asked").open("a", buffering=1)

class Slow(AsyncLLM):
    async def generate(self, prompt, params=None, **options):
        if params.max_tokens:  # an item, and not the score of its answer
            asked.write(self.tokenizer.decode(list(prompt)) + "\\n")
        await asyncio.sleep(0.02)
        async for delta in super().generate(prompt, params, **options):
            yield delta

class Watcher:
    def begin(self, *args): pass
    def advance(self): pass
    def say(self, text): pass

async def cost(*args):
    return Cost(1, 1, 512, 1, 0.5, 0.1, 10.0, 100.0)

items = [read_item({"prompt": f"question {n}?", "reference": "a"}, n) for n in range(1, 31)]
store = Store(folder / "answers.sqlite")
load = lambda model, engine: Slow("null", max_context=512, max_batch_size=1, max_batch_tokens=64)
climber = Climber(Subject("null", "null", False), items, [], LadderConfig(), ExamConfig(max_tokens=4), EngineConfig(),
                  store, Watcher(), load=load, measure=cost)
climber.run([parse_rung("base"), parse_rung("weights=int8")])
store.close()
"""


def stored(folder: Path) -> dict[str, set[str]]:
    """Items by rung."""
    database = sqlite3.connect(folder / "answers.sqlite", timeout=20)
    rows = database.execute("SELECT rung, item FROM answers").fetchall()
    database.close()
    found: dict[str, set[str]] = {}
    for rung, item in rows:
        found.setdefault(rung, set()).add(item)
    return found


def test_kill_minus_9_and_start_again(tmp_path: Path) -> None:
    """In the second rung: what is stored is not asked again."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    log = tmp_path / "asked"
    log.touch()
    process = subprocess.Popen(command)
    until = time.monotonic() + 100
    while time.monotonic() < until and log.read_text().count("\n") < 40:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_asked = log.read_text().count("\n")
    before = stored(tmp_path)
    assert 30 < sum(map(len, before.values())) < 60
    subprocess.run(command, check=True, timeout=100)
    after = stored(tmp_path)
    assert [len(items) for items in after.values()] == [30, 30]
    assert all(before[rung] <= after[rung] for rung in before)
    # Two answers may have been under way when it was killed; they alone are asked again.
    assert log.read_text().count("\n") - num_asked == 60 - sum(map(len, before.values()))


def test_cut_off_in_the_first_rung(climb, solved, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = climb(solved(10), ["base", "kv=int4"], max_drop="50%")
    add, added = Store.add, []

    def add_some(self, rung, item, *rest):
        if len(added) == 12:
            raise KeyboardInterrupt
        added.append(item)
        add(self, rung, item, *rest)

    monkeypatch.setattr(Store, "add", add_some)
    with pytest.raises(KeyboardInterrupt):
        climb(solved(30), ["base", "kv=int4"], max_drop="50%")
    monkeypatch.undo()
    found, again = climb(solved(30), ["base", "kv=int4"], max_drop="50%")
    assert again.begun == [("base", 30, 22), ("kv=int4", 30, 10)]
    assert statuses(found) == statuses(whole) == {"base": "base", "kv=int4": "rejected"}
