"""Layers that keep their KV cache in 16 bits: which are chosen, on what evidence, and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError
from turbolm.ladder import sensitivity
from turbolm.ladder.rungs import parse_rung
from turbolm.ladder.sensitivity import Sensitivity, choose, find_layers

ALONE = [0.01, 0.5, 0.02, 0.3, 0.01, 0.04]


def added(layers: Sequence[int]) -> float:
    return sum(ALONE[layer] for layer in layers)


@pytest.mark.parametrize(
    ("limit", "skipped"), [(1.0, ()), (0.4, (1,)), (0.1, (1, 3)), (0.05, (1, 3, 5)), (0.01, (0, 1, 2, 3, 5))]
)
def test_the_fewest_are_kept(limit: float, skipped: tuple[int, ...]) -> None:
    found = choose("int4", ALONE, limit, added)
    assert found.skipped == skipped
    assert found.divergence <= limit
    assert found.divergences == tuple(ALONE)


def test_what_counts_is_what_they_do_together() -> None:
    assert choose("int4", ALONE, 0.1, lambda layers: added(layers) / 4).skipped == (1,)
    assert choose("int4", ALONE, 0.1, lambda layers: 2 * added(layers)).skipped == (1, 3, 5)


def test_where_nothing_helps_it_is_said() -> None:
    with pytest.raises(ConfigError, match=r"whichever layers are kept.*0\.0100 nats"):
        choose("int4", ALONE, 0.01, lambda _: 1.0)


def test_layers_of_a_real_model(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is made sensitive: its codes are few where the others' are many."""
    monkeypatch.setattr(sensitivity, "_NUM_PIECES", 1)
    monkeypatch.setattr(sensitivity, "_PIECE", 32)
    found = find_layers(str(smollm2_path), EngineConfig(kv="int8", threads=1), 0.05, "")
    assert len(found.divergences) == 30
    assert all(0 <= value < 0.2 for value in found.divergences)
    assert found.limit == pytest.approx(-math.log(0.975))
    assert found.divergence <= found.limit
    assert len(found.skipped) < 10  # int8 costs little


@pytest.mark.parametrize(("model", "kv"), [("null", "int4"), ("smollm2", "bfloat16")])
def test_what_cannot_be_chosen(model: str, kv: str, smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no layers|leaves all layers as they are"):
        find_layers("null" if model == "null" else str(smollm2_path), EngineConfig(kv=kv), 0.05, "")


def test_a_rung_with_layers_to_be_found(climb, solved) -> None:
    asked = []

    def find(model: str, engine: EngineConfig, max_drop: float, data: str) -> Sensitivity:
        asked.append((model, engine.kv, max_drop, data))
        return Sensitivity("int4", tuple(ALONE), (1, 3), 0.08, 0.1)

    def is_bad(engine: EngineConfig) -> bool:
        return engine.kv == "int4" and not engine.kv_skip_layers

    rungs = ["base", "kv=int4", "kv=int4+skip=auto"]
    for _ in range(2):  # known the second time
        found, _ = climb(solved(40), rungs, metric="agreement", find=find, bad=is_bad)
        assert found.steps[1].outcome.status == "rejected"
        last = found.steps[2]
        assert asked == [("null", "int4", 0.01, "")]
        assert last.rung == parse_rung("kv=int4+skip=1,3")
        assert last.rung.title == "KV int4 but for 2 layers"
        assert last.rung.engine_options == {"kv": "int4", "kv_skip_layers": "1,3"}
        assert last.layers == Sensitivity("int4", tuple(ALONE), (1, 3), 0.08, 0.1)
        assert last.outcome.status == "accepted"  # though kv=int4, of which it changes less, was rejected


def test_layers_that_cannot_be_found_leave_the_rung_out(climb, solved) -> None:
    found, _ = climb(solved(5), ["base", "kv=int4+skip=auto"], find=find_layers)
    assert found.steps[1].outcome.status == "not served"
    assert "has no layers whose precision" in found.steps[1].outcome.reason
