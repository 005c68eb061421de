"""The LoRA adapters that a model at work has, by name, as front ends see them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

from turbolm.errors import RequestError, nearest
from turbolm.lora import check_adapter_name


class AdaptedEngine(Protocol):
    """`Engine` or `SupervisedEngine`."""

    def add_adapter(self, name: str, source: str) -> None: ...
    def remove_adapter(self, name: str) -> None: ...


class ServedAdapters(Mapping[str, str]):
    """Name → where it came from. Methods may be called from any thread, and wait for the engine: from a coroutine,
    call `add` and `remove` through `asyncio.to_thread`."""

    def __init__(self, engine: AdaptedEngine, sources: Mapping[str, str]) -> None:
        """`sources`: those that the engine began with."""
        self._engine = engine
        self._sources = dict(sources)
        self._lock = threading.Lock()

    def add(self, name: str, source: str) -> None:
        """Read an adapter (a folder as PEFT saves it, or hf:org/name); requests may choose it from then on. Raises
        UserError for one that can't be used, CapacityError where there is no room."""
        check_adapter_name(name)
        with self._lock:
            self._engine.add_adapter(name, source)
            self._sources = {**self._sources, name: source}

    def remove(self, name: str) -> None:
        """No further request may choose it; those at work with it go on to their ends. Raises RequestError."""
        with self._lock:
            self.check(name)
            self._engine.remove_adapter(name)
            self._sources = {known: source for known, source in self._sources.items() if known != name}

    def check(self, name: str | None) -> None:
        """Raises RequestError for a name of none; None, the model as it is, will do."""
        if name is not None and name not in self._sources:
            known = ", ".join(self._sources) or "none"
            raise RequestError(f"no adapter '{name}'.{nearest(name, self._sources)} There are: {known}", "adapter")

    def __getitem__(self, name: str) -> str:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
