"""LadderConfig: what a user may set of the ladder. Command-line flags are generated from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from turbolm.config import parse_part, parse_size
from turbolm.errors import ConfigError

Metric = Literal["auto", "score", "agreement"]
Preference = Literal["memory", "speed"]


@dataclass(frozen=True, slots=True)
class LadderConfig:
    """What a user may set."""

    out: str = ""
    """Folder for report.html, report.json and the answers; by default ladder-MODEL. The same command goes on where
    an earlier one was cut off."""
    rungs: str = ""
    """What to try, the mildest first, as in "kv=int8 weights=awq weights=awq:64+kv=int4 kv=int4+skip=0,-1
    model=./folder", or "all"; by default the KV cache in int8, AWQ weights, and both."""
    max_drop: str = "1%"
    """Largest part of the base's quality that a rung may lose."""
    min_score: str = "0%"
    """Mean score below which the base itself isn't good enough."""
    metric: Metric = "auto"
    """What decides: the score of checks, or agreement with the base; "auto": the score if most items have a check."""
    prefer: Preference = "memory"
    """Which of the acceptable rungs is recommended."""
    probes: int = 8
    """Generated questions of each kind that short benchmarks miss; 0: none."""
    budget: str = ""
    """Time for everything, such as 20m or 2h: as many items are asked as fit. By default all."""
    every: bool = False
    """Run rungs, too, whose changes include those of a rejected one."""
    memory: str = ""
    """Memory that the table of what fits refers to, such as 24G; by default this machine's."""
    streams: int = 0
    """Answers at once where speed is measured under load; 0: 16 on a CPU, 64 on a GPU."""

    def __post_init__(self) -> None:
        for name in ("probes", "streams"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 1 << 31:
                raise ConfigError(f"{name} must be a whole number, 0 or more, got {getattr(self, name)!r}")
        for name, allowed in (("metric", ("auto", "score", "agreement")), ("prefer", ("memory", "speed"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not 0 < parse_part(self.max_drop, "max_drop") < 1:
            raise ConfigError(f"max_drop is {self.max_drop!r}; give more than 0% and less than 100%")
        parse_part(self.min_score, "min_score")
        if self.budget:
            parse_time(self.budget, "budget")
        if self.memory:
            parse_size(self.memory, "memory")


def parse_time(text: str, name: str) -> float:
    """`"90s"`, `"20m"`, `"2h"` or `"1h30m"` → seconds."""
    match = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m)?\s*(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower()
    )
    hours, minutes, seconds = (float(value or 0) for value in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise ConfigError(f"{name} is {text!r}; give a time such as 90s, 20m or 2h")
    return total
