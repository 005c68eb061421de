"""Adapters in the engine: their places, and that nothing of one reaches another's requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from turbolm.cache.prefix_cache import BlockKeys
from turbolm.config import EngineConfig, with_room
from turbolm.engine.adapters import Adapters
from turbolm.engine.batch import lay_out
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.errors import CapacityError, ConfigError, RequestError
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.peft import Adapter
from turbolm.types import LoadedAdapter, Request, SamplingParams, Sequence


class Places:
    """An `AdaptedDecoder` that notes what lies where."""

    num_places, max_rank, spec = 2, 16, None

    def __init__(self) -> None:
        self.held: dict[int, object] = {}

    def put(self, place: int, adapter: object) -> None:
        self.held[place] = adapter


def adapter(name: str) -> Adapter:
    return cast(Adapter, SimpleNamespace(path=Path(name)))


@pytest.fixture
def adapters() -> Adapters:
    return Adapters(cast(AdaptedDecoder, Places()))


def test_a_removed_adapter_keeps_its_place_while_a_request_has_it(adapters: Adapters) -> None:
    adapters.add("a", adapter("a"))
    adapters.add("b", adapter("b"))
    first = adapters.find("a")
    assert {first.place, adapters.find("b").place} == {0, 1}
    with pytest.raises(RequestError, match="'a' already"):
        adapters.add("a", adapter("a"))
    with pytest.raises(CapacityError, match="all 2 places"):
        adapters.add("c", adapter("c"))
    adapters.remove("a")
    with pytest.raises(RequestError, match="no adapter 'a'"):
        adapters.find("a")
    with pytest.raises(RequestError, match="no adapter 'a'"):
        adapters.remove("a")
    with pytest.raises(CapacityError, match="1 of them by removed ones"):
        adapters.add("a", adapter("a2"), lambda own: own == first)
    adapters.add("a", adapter("a2"), lambda own: False)
    again = adapters.find("a")
    assert again.place == first.place and again != first


def test_adapters_share_no_blocks_of_the_prefix_cache() -> None:
    tokens = list(range(32))
    loaded = [None, LoadedAdapter("a", 0, 0), LoadedAdapter("a", 1, 0), LoadedAdapter("b", 2, 1)]
    assert len({BlockKeys(tokens, 16, "", own)[0] for own in loaded}) == len(loaded)
    assert BlockKeys(tokens, 16, "", loaded[1])[1] == BlockKeys(tokens, 16, "", LoadedAdapter("a", 0, 0))[1]


def test_a_step_says_which_row_has_which_adapter_and_hits_are_the_adapters_own() -> None:
    scheduler = Scheduler(
        num_blocks=32, block_size=8, max_batch_size=4, max_batch_tokens=64, max_context=64, max_waiting=9
    )
    plain = Request("plain", tuple(range(17)), SamplingParams(max_tokens=2))
    own = replace(plain, id="own", adapter="a", loaded_adapter=LoadedAdapter("a", 0, 1))

    def step_of(*requests: Request) -> tuple[list[int] | None, list[int]]:
        """Rows' adapters of the first step, and how many tokens of each prompt are computed in it."""
        for request in requests:
            scheduler.add(request)
        found = None
        while (step := scheduler.next_batch()) is not None:
            arrays = lay_out(step, 8, [[0] for _ in step.items])
            if found is None:
                places = None if arrays.adapters is None else cast(list[int], arrays.adapters.tolist())
                assert arrays.adapters is None or arrays.adapters.dtype == np.int32
                found = places, [item.num_new_tokens for item in step.items]
            assert scheduler.uses(LoadedAdapter("a", 0, 1)) or own not in requests
            scheduler.update(step, [StepResult((40,)) if item.samples else StepResult() for item in step.items])
        assert found is not None
        return found

    assert step_of(plain) == (None, [17])
    assert step_of(own) == ([1] * 17, [17])  # nothing of the plain one's
    assert not scheduler.uses(LoadedAdapter("a", 0, 1))
    assert step_of(replace(plain, id="2"), replace(own, id="3")) == ([-1, 1], [1, 1])  # each finds its own


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapters": ("nameless",)}, "NAME=PATH"),
        ({"adapters": ("a=",)}, "NAME=PATH"),
        ({"adapters": ("a b=x",)}, "'a b'"),
        ({"adapters": ("a=x", "a=y")}, "twice"),
        ({"adapters": {"a": "x", "b": "y"}, "max_adapters": 1}, "2 are given"),
        ({"max_adapters": -1}, "max_adapters must be"),
        ({"max_adapter_rank": 5000}, "max_adapter_rank must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EngineConfig.of(None, **options)


def test_room_is_what_was_asked_for_or_what_the_adapters_take() -> None:
    given = EngineConfig.of(None, adapters={"a": "x", "b": "y=z"})
    assert given.adapters == ("a=x", "b=y=z")
    found = with_room(given, [8, 40])
    assert (found.max_adapters, found.max_adapter_rank) == (2, 40)
    assert with_room(EngineConfig(max_adapters=3), []).max_adapter_rank == 16
    assert with_room(EngineConfig(), []).max_adapters == 0
    with pytest.raises(ConfigError, match="rank 40"):
        with_room(EngineConfig.of(given, max_adapter_rank=32), [8, 40])


def test_drafts_have_the_adapter_of_their_sequence() -> None:
    def item(adapter: LoadedAdapter | None, drafts: tuple[int, ...]) -> ScheduledSequence:
        sequence = Sequence(Request("r", (1, 2), loaded_adapter=adapter))
        sequence.blocks = [0]
        return ScheduledSequence(sequence, 1, 1, True, drafts)

    items = (item(LoadedAdapter("a", 4, 3), (7, 8)), item(None, ()), item(LoadedAdapter("b", 5, 0), (9,)))
    arrays = lay_out(Step(items, 6), 8, [[0], [0], [0]])
    assert arrays.adapters is not None
    assert arrays.adapters.tolist() == [3, 3, 3, -1, 0, 0]
    assert lay_out(Step(items[1:2], 1), 8, [[0]]).adapters is None
