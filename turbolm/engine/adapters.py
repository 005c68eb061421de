"""The LoRA adapters that an engine has: which name stands for which, and which place its weights are in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from turbolm.errors import CapacityError, ConfigError, RequestError, nearest
from turbolm.hub.adapters import fetch_adapter
from turbolm.models.peft import Adapter, read_adapter
from turbolm.models.spec import DecoderSpec
from turbolm.types import LoadedAdapter

#: Whether some request that is alive was given this adapter.
IsUsed = Callable[[LoadedAdapter], bool]


class AdapterRoom(Protocol):
    """A model with places for adapters: `AdaptedDecoder`, or what stands for all ranks' ones."""

    @property
    def num_places(self) -> int: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def spec(self) -> DecoderSpec:
        """The whole model's."""

    def put(self, place: int, adapter: Adapter) -> None:
        """Rows of this place get what the adapter adds, in steps that are submitted from now on."""


class Adapters:
    """For the engine's thread, but for `read`. A removed adapter keeps its place until the last request with it has
    ended, so that its answers go on as they began."""

    def __init__(self, decoder: AdapterRoom) -> None:
        self._decoder = decoder
        self._places: list[LoadedAdapter | None] = [None] * decoder.num_places
        self._named: dict[str, LoadedAdapter] = {}
        self._numbers = itertools.count()

    def read(self, source: str) -> Adapter:
        """The adapter in a folder or a hub's repository, checked against the model; takes time. Raises UserError."""
        adapter = read_adapter(fetch_adapter(source), self._decoder.spec)
        if adapter.rank > self._decoder.max_rank:
            raise ConfigError(
                f"the adapter '{source}' has rank {adapter.rank}, and there is room for {self._decoder.max_rank}: "
                f"start with max_adapter_rank {adapter.rank}"
            )
        return adapter

    def add(self, name: str, adapter: Adapter, is_used: IsUsed = lambda _: False) -> None:
        """Requests may name it from now on. Raises RequestError for a name in use, CapacityError where all places are
        taken."""
        if name in self._named:
            raise RequestError(f"there is an adapter '{name}' already: remove it first, or choose another name", "name")
        named = set(self._named.values())
        free = (
            place
            for place, owner in enumerate(self._places)
            if owner is None or (owner not in named and not is_used(owner))
        )
        place = next(free, None)
        if place is None:
            ending = len(self._places) - len(named)
            raise CapacityError(
                f"all {len(self._places)} places for adapters are taken"
                + (f", {ending} of them by removed ones whose requests have not ended" if ending else "")
                + ": remove one, or start with a larger max_adapters"
            )
        self._decoder.put(place, adapter)
        self._places[place] = self._named[name] = LoadedAdapter(name, next(self._numbers), place)

    def remove(self, name: str) -> None:
        """No further request gets it. Raises RequestError where there is no such adapter."""
        del self._named[self.find(name).name]

    def find(self, name: str) -> LoadedAdapter:
        """Raises RequestError."""
        found = self._named.get(name)
        if found is None:
            known = ", ".join(self._named) or "none"
            raise RequestError(f"no adapter '{name}'.{nearest(name, self._named)} There are: {known}", "adapter")
        return found
