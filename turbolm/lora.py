"""LoRA adapters as they are asked for: their names, how many of which rank, and the memory that this takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from turbolm.errors import ConfigError
from turbolm.memory import ITEM_BYTES, ModelNeeds

#: Ranks are padded with zeros to a multiple of this.
RANK_STEP = 16
_MOST = 1024  # adapters, or their rank


def as_entries(given: Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
    """NAME=PATH for each of name → path."""
    return tuple(f"{name}={path}" for name, path in given.items()) if isinstance(given, Mapping) else tuple(given)


def adapter_sources(entries: Sequence[str]) -> dict[str, str]:
    """Of each NAME=PATH, name → path. Raises ConfigError."""
    found = {}
    for entry in entries:
        name, _, path = entry.partition("=") if isinstance(entry, str) else ("", "", "")
        if not path:
            raise ConfigError(f"an adapter is given as {entry!r:.120}; give NAME=PATH")
        found[check_adapter_name(name)] = path
    if len(found) < len(entries):
        raise ConfigError(f"adapters holds a name twice: {', '.join(entries)}")
    return found


def check_adapter_name(name: str) -> str:
    """The name. Raises ConfigError for one that no request could give."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}", name):
        raise ConfigError(
            f"an adapter's name is {name!r:.150}; allowed: up to 128 letters, digits and _ . : / -, the first a letter "
            "or digit"
        )
    return name


def check_room(max_adapters: int, max_rank: int, num_given: int) -> None:
    """Raises ConfigError for numbers that can't be."""
    for name, value in (("max_adapters", max_adapters), ("max_adapter_rank", max_rank)):
        if type(value) is not int or not 0 <= value <= _MOST:
            raise ConfigError(f"{name} must be a whole number from 0 to {_MOST}, got {value!r}")
    if 0 < max_adapters < num_given:
        raise ConfigError(f"max_adapters is {max_adapters}, and {num_given} are given; raise it")


def adapter_bytes(max_adapters: int, max_rank: int, model: ModelNeeds, dtype: str) -> int:
    """Memory for so many; `dtype`: of activations."""
    padded = -(-max_rank // RANK_STEP) * RANK_STEP
    return max_adapters * padded * model.adapter_elements * ITEM_BYTES[dtype]
