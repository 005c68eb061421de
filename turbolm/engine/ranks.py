"""What passes from the process that leads a model to its other ranks: how to load it, and then each step, and adapters
between steps."""

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
from turbolm.engine.adjustments import HostAdjustments
from turbolm.engine.batch import StepArrays
from turbolm.engine.pooling import RowRange
from turbolm.engine.rank_adapters import encode_module, encode_place
from turbolm.engine.step_device import Draws
from turbolm.models.peft import Adapter
from turbolm.ops.adjustments import FLOATS
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.processes import STUCK_SECONDS, RankProcesses

LOAD, STEP, WARM_UP, ADAPTER_MODULE, ADAPTER_PLACE = range(5)  # to a rank
STARTED, LOADED, FAILED = range(3)  # from a rank

# Lengths of the arrays, columns of the block tables; max_query, max_context, num_decodes; number of chunks, and of
# draws, pools and cleared slots (-1: none of these, or no adjustments); whether draws have filters, logits are
# gathered, rows have adapters, several rows are of one sequence.
_STEP = struct.Struct("<7i i 3i i 3i ????")
_DRAW_TYPES = (np.float64, np.float32, np.float32, np.float32, np.int32)
_ADJUSTED = HostAdjustments._fields[:-1]
_ADJUSTMENTS = struct.Struct(f"<{len(_ADJUSTED)}i i")  # lengths of the arrays, columns of the drafts


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
    draws: Draws | None = None
    gathers: bool = False
    pools: list[RowRange] | None = None
    adjustments: HostAdjustments | None = None

    def encode(self) -> list[bytes]:
        arrays, draws, changed = self.arrays, self.draws, self.adjustments
        parts = list(arrays[:7])
        header = _STEP.pack(
            *(part.size for part in parts),
            arrays.block_tables.shape[1],
            arrays.max_query,
            arrays.max_context,
            arrays.num_decodes,
            len(arrays.chunks),
            -1 if draws is None else len(draws.uniform),
            -1 if self.pools is None else len(self.pools),
            -1 if changed is None else len(changed.cleared),
            draws is not None and draws.has_filters,
            self.gathers,
            arrays.adapters is not None,
            arrays.shares_context,
        )
        ints = (arrays.chunks, self.pools or (), () if changed is None else changed.cleared)
        parts += [np.array(values, np.int32) for values in ints]
        parts += [] if arrays.adapters is None else [arrays.adapters]
        columns = () if draws is None else draws[:5]
        sent = [header, *(array.tobytes() for array in (*parts, *columns))]
        if changed is not None:
            *adjusted, _ = changed
            sent.append(_ADJUSTMENTS.pack(*(array.size for array in adjusted), changed.drafts.shape[1]))
            sent += [array.tobytes() for array in adjusted]
        return sent

    @classmethod
    def decode(cls, body: memoryview) -> StepOrder:
        """A copy of what `body` holds."""
        values = _STEP.unpack_from(body)
        sizes, (num_columns, max_query, max_context, num_decodes) = values[:7], values[7:11]
        num_chunks, num_draws, num_pools, num_cleared, has_filters, gathers, has_adapters, shares_context = values[11:]
        offset = _STEP.size

        def take(count: int, dtype: type[np.generic] = np.int32) -> Any:
            nonlocal offset
            found = np.frombuffer(body, dtype, count, offset).copy() if count > 0 else np.empty(0, dtype)
            offset += found.nbytes
            return found

        parts = [take(size) for size in sizes]
        parts[5] = parts[5].reshape(-1, num_columns)
        chunks = tuple(map(tuple, take(3 * num_chunks).reshape(-1, 3).tolist()))
        pools = list(map(tuple, take(2 * num_pools).reshape(-1, 2).tolist()))
        cleared = take(num_cleared).tolist()
        adapters = take(len(parts[0])) if has_adapters else None
        arrays = StepArrays._make([*parts, max_query, max_context, num_decodes, chunks, adapters, shares_context])
        columns = [take(num_draws, dtype) for dtype in _DRAW_TYPES] if num_draws >= 0 else None
        draws = None if columns is None else Draws._make([*columns, has_filters])
        changed = None
        if num_cleared >= 0:
            *counts, num_drafts = _ADJUSTMENTS.unpack_from(body, offset)
            offset += _ADJUSTMENTS.size
            kinds = [np.float32 if name in FLOATS else np.int32 for name in _ADJUSTED]
            fields = [take(count, kind) for count, kind in zip(counts, kinds, strict=True)]
            changed = HostAdjustments._make([*fields, cleared])
            changed = changed._replace(drafts=changed.drafts.reshape(len(changed.repetition), num_drafts))
        return cls(arrays, draws, gathers, pools if num_pools >= 0 else None, changed)


class Ranks:
    """The other ranks, as the leading one's `Followers`."""

    def __init__(self, processes: RankProcesses, group: ProcessGroup, folder: TemporaryDirectory[str]) -> None:
        """`folder`: where they found each other, and may look again."""
        self._processes = processes
        self._group = group
        self._folder = folder

    def step(
        self,
        arrays: StepArrays,
        draws: Draws | None,
        gathers: bool,
        pools: list[RowRange] | None,
        adjustments: HostAdjustments | None,
    ) -> None:
        self._processes.send(STEP, StepOrder(arrays, draws, gathers, pools, adjustments).encode())

    def warm_up(self) -> None:
        self._processes.send(WARM_UP)

    def put_adapter(self, place: int, adapter: Adapter) -> None:
        for name, module in adapter.modules.items():
            self._processes.send(ADAPTER_MODULE, encode_module(name, module))
        self._processes.send(ADAPTER_PLACE, encode_place(place))

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
