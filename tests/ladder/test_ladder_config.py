from __future__ import annotations

import pytest

from turbolm.config import parse_part
from turbolm.errors import ConfigError
from turbolm.fields import field_help
from turbolm.ladder.config import LadderConfig, parse_time


@pytest.mark.parametrize(("text", "part"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02), (".5", 0.5), ("100%", 1)])
def test_parts(text: str, part: float) -> None:
    assert parse_part(text, "x") == pytest.approx(part)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("90", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), ("1m 5s", 65)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text, "x") == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": "0%"}, "give more than 0%"),
        ({"max_drop": "-1%"}, "give a part from 0% to 100%"),
        ({"max_drop": "2"}, "give a part"),
        ({"min_score": "good"}, "min_score is 'good'"),
        ({"budget": "soon"}, "give a time such as 90s"),
        ({"budget": "0m"}, "give a time"),
        ({"memory": "24 apples"}, "give a size"),
        ({"metric": "loss"}, "allowed: auto, score, agreement"),
        ({"probes": -1}, "probes must be a whole number"),
    ],
)
def test_what_cannot_be_used(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LadderConfig(**options)
    assert message in str(error.value)


def test_every_option_has_help() -> None:
    assert set(field_help(LadderConfig)) == set(LadderConfig.__dataclass_fields__)
