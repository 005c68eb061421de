"""What passes from the process that leads a model to its other ranks: how to load it, and then each step."""

from __future__ import annotations

import json
import struct
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from turbolm.config import ResolvedConfig
from turbolm.engine.batch import StepArrays
from turbolm.engine.step_device import Draws
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.processes import STUCK_SECONDS, RankProcesses

LOAD, STEP, WARM_UP = range(3)  # to a rank
STARTED, LOADED, FAILED = range(3)  # from a rank

# Lengths of the arrays, columns of the block tables; max_query, max_context, num_decodes; number of chunks and of
# draws (-1: none), and whether these have filters; whether logits are gathered.
_STEP = struct.Struct("<7i i 3i 2i ??")
_DRAW_TYPES = (np.float64, np.float32, np.float32, np.float32, np.int32)


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What a rank needs to load its part."""

    path: Path  # the checkpoint
    config: ResolvedConfig
    vocab_size: int  # tokens that may be chosen
    store: Path  # where ranks find each other

    def encode(self) -> bytes:
        values = asdict(self) | {"path": str(self.path), "store": str(self.store)}
        return json.dumps(values).encode()

    @classmethod
    def decode(cls, body: bytes) -> LoadOrder:
        values = json.loads(body)
        config = _as_dataclass(ResolvedConfig, values["config"])
        return cls(Path(values["path"]), config, values["vocab_size"], Path(values["store"]))


def _as_dataclass(kind: type, values: dict[str, Any]) -> Any:
    """What `asdict` made of one, and JSON of that: lists are tuples again."""
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):
        value, hint = values[field.name], hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            value = _as_dataclass(hint, value)
        found[field.name] = _as_tuple(value)
    return kind(**found)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


class StepOrder(NamedTuple):
    """The arguments of `StepDevice.compute`."""

    arrays: StepArrays
    draws: Draws | None
    gathers: bool

    def encode(self) -> list[bytes]:
        arrays, draws = self.arrays, self.draws
        parts = arrays[:7]
        header = _STEP.pack(
            *(part.size for part in parts),
            arrays.block_tables.shape[1],
            arrays.max_query,
            arrays.max_context,
            arrays.num_decodes,
            len(arrays.chunks),
            -1 if draws is None else len(draws.uniform),
            draws is not None and draws.has_filters,
            self.gathers,
        )
        columns = () if draws is None else draws[:5]
        chunks = np.array(arrays.chunks, np.int32)
        return [header, *(array.tobytes() for array in (*parts, chunks, *columns))]

    @classmethod
    def decode(cls, body: memoryview) -> StepOrder:
        """A copy of what `body` holds."""
        values = _STEP.unpack_from(body)
        sizes, (num_columns, max_query, max_context, num_decodes) = values[:7], values[7:11]
        num_chunks, num_draws, has_filters, gathers = values[11:]
        offset = _STEP.size

        def take(count: int, dtype: type[np.generic]) -> Any:
            nonlocal offset
            found = np.frombuffer(body, dtype, count, offset).copy() if count else np.empty(0, dtype)
            offset += found.nbytes
            return found

        parts = [take(size, np.int32) for size in sizes]
        parts[5] = parts[5].reshape(-1, num_columns)
        chunks = tuple(map(tuple, take(3 * num_chunks, np.int32).reshape(-1, 3).tolist()))
        arrays = StepArrays._make([*parts, max_query, max_context, num_decodes, chunks, None, False])
        columns = [take(num_draws, dtype) for dtype in _DRAW_TYPES] if num_draws >= 0 else None
        return cls(arrays, None if columns is None else Draws._make([*columns, has_filters]), gathers)


class Ranks:
    """The other ranks, as the leading one's `Followers`."""

    def __init__(self, processes: RankProcesses, group: ProcessGroup, folder: TemporaryDirectory[str]) -> None:
        """`folder`: where they found each other, and may look again."""
        self._processes = processes
        self._group = group
        self._folder = folder

    def step(self, arrays: StepArrays, draws: Draws | None, gathers: bool) -> None:
        self._processes.send(STEP, StepOrder(arrays, draws, gathers).encode())

    def warm_up(self) -> None:
        self._processes.send(WARM_UP)

    def check(self, seconds: float) -> None:
        self._processes.check()
        if seconds > STUCK_SECONDS:
            self._processes.lose_stuck()

    def watching(self) -> AbstractContextManager[None]:
        return self._processes.watching()

    def close(self) -> None:
        self._processes.close()
        self._group.abort()
        self._folder.cleanup()
