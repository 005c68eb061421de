from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from turbolm.errors import ConfigError
from turbolm.eval.answer import Answer, Distributions
from turbolm.ladder.store import Store


def test_what_is_added_is_there_after_opening_again(tmp_path: Path) -> None:
    rows = Distributions(np.arange(6, dtype=np.int32).reshape(2, 3), -np.ones((2, 3), np.float32))
    store = Store(tmp_path / "s.sqlite")
    store.add("r", "a", Answer(text="x", score=1.0), rows)
    store.add("r", "b", Answer(text="y"), None)
    store.add("q", "a", Answer(text="z"), None)
    store.set_fact("r", "cost", {"bytes": 1})
    store.set_fact("r", "cost", {"bytes": 2})
    store.close()
    store = Store(tmp_path / "s.sqlite")
    assert {item: answer.text for item, answer in store.answers("r").items()} == {"a": "x", "b": "y"}
    assert store.distributions("r", "a").token_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert store.distributions("r", "b") is None
    assert store.distributions("r", "none") is None
    assert store.fact("r", "cost") == {"bytes": 2}
    assert store.fact("q", "cost") is None
    store.close()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = Store(tmp_path / "s.sqlite")
    with pytest.raises(ConfigError, match="another run is at work on it"):
        Store(tmp_path / "s.sqlite")
    first.close()
    Store(tmp_path / "s.sqlite").close()


def test_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_text("something else, and long enough to be looked at" * 100)
    with pytest.raises(ConfigError, match="is no store of answers"):
        Store(tmp_path / "s.sqlite")
    with pytest.raises(ConfigError, match="can't use"):
        Store(tmp_path / "missing" / "s.sqlite")
