"""Models that `turbolm convert` wrote: matrices in the layout of one backend's kernels, divided over its ranks.

turbolm.json    what the folder is for, and what describes each matrix
rank-R/         safetensors of rank R: vectors, dense matrices, and parts of the others (MATRIX:PART)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from turbolm.errors import CheckpointError
from turbolm.hub.files import CONVERTED as NAME
from turbolm.memory import Conversion
from turbolm.models.loader import Loader, Progress
from turbolm.models.safetensors import SafetensorsSource
from turbolm.ops import Ops, PreparedLinear
from turbolm.ops.select import select_layout
from turbolm.ops.sharded import ShardedOps
from turbolm.ops.stored import StoredLinear
from turbolm.quant import load_weight

_FORMAT, _VERSION = "turbolm-converted", 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """turbolm.json."""

    conversion: Conversion
    fingerprint: str  # of the layout
    source: str  # the model's name, as it was given
    matrices: Mapping[str, Mapping[str, Any]]  # those in a layout of their own

    def write(self, folder: Path) -> None:
        record = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        (folder / NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """None where the folder was not converted. Raises CheckpointError for a broken file, or another version's."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise CheckpointError(f"{path} is not of the format {_FORMAT}, version {_VERSION}: {_ADVICE}")
        about = {field.name: record["conversion"][field.name] for field in fields(Conversion)}
        return Manifest(Conversion(**about), record["fingerprint"], record["source"], dict(record["matrices"]))
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is broken ({error}): {_ADVICE}") from None


_ADVICE = "convert the model again with this version of turbolm (turbolm convert MODEL -o FOLDER)"


def rank_folder(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


class ConvertedLoader(Loader):
    """Reads one rank's matrices as they are."""

    def __init__(
        self, folder: Path, manifest: Manifest, ops: Ops, rank: int = 0, progress: Progress | None = None
    ) -> None:
        """Raises CheckpointError where the kernels' layout has changed since."""
        source = SafetensorsSource(rank_folder(folder, rank))
        super().__init__(source, ops, progress)
        self.source: SafetensorsSource = source
        self._manifest = manifest
        self._layout = select_layout(manifest.conversion.device)
        if self._layout.fingerprint != manifest.fingerprint:
            raise CheckpointError(
                f"{folder} was converted to another layout of the kernels' ({manifest.fingerprint}, now "
                f"{self._layout.fingerprint}): {_ADVICE}"
            )

    def linear(
        self, prefixes: Sequence[str], shape: tuple[int, int], has_bias: bool, rows: Sequence[int] | None = None
    ) -> PreparedLinear:
        del has_bias, rows  # the matrices were stacked so, and their bias is with them
        return self._restore("+".join(prefixes), shape)

    def embedding(self, prefix: str, shape: tuple[int, int]) -> PreparedLinear:
        if self._layout.has_tables:
            return self._restore(prefix, shape, may_have_more=True)
        weight = load_weight(self.source, prefix)
        if weight.shape[0] < shape[0] or weight.shape[1] != shape[1]:
            raise self._misfit(prefix, weight.shape, shape)
        is_sharded = self._manifest.conversion.tensor_parallel > 1
        prepared = (
            cast(ShardedOps, self.ops).prepare_table([weight]) if is_sharded else self.ops.prepare_embedding(weight)
        )
        self._release(prefix)
        return prepared

    def _restore(self, name: str, shape: tuple[int, int], *, may_have_more: bool = False) -> PreparedLinear:
        names = [tensor for tensor in self.source.tensors if tensor.rpartition(":")[0] == name]
        tensors = {tensor.rpartition(":")[2]: self.source.read(tensor) for tensor in names}
        try:
            linear = self._layout.restore(StoredLinear(self._manifest.matrices[name], tensors), self.ops)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{name}: {NAME} and the files in {self.source.path} don't fit ({error})") from None
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {self.source.path}: {error}") from None
        found = (linear.out_features, linear.in_features)
        if found[1] != shape[1] or found[0] < shape[0] or (found[0] > shape[0] and not may_have_more):
            raise self._misfit(name, found, shape)
        for tensor in names:
            self._used.add(tensor)
            self._advance(self.source.tensors[tensor].num_bytes)
            self.source.release(tensor)
        return linear

    def _misfit(self, name: str, found: tuple[int, int], expected: tuple[int, int]) -> CheckpointError:
        return CheckpointError(f"{name}: {list(found)} in the converted model, the config implies {list(expected)}")
