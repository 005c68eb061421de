"""From a weight source to prepared layers: each tensor is read once, checked, handed to the backend,
and released, so that the model never stands in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from turbolm.errors import CheckpointError
from turbolm.ops import Ops, PreparedLinear
from turbolm.quant import find_reader
from turbolm.quant.rounding import Rounding
from turbolm.weights import Packing, TensorInfo, Weight, WeightSource

#: Called with (bytes read so far, bytes in total).
Progress = Callable[[int, int], None]

# Tensors that some checkpoints carry and nothing needs.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".self_attn.k_scale", ".self_attn.v_scale")


class DeviceSource:
    """A `WeightSource` whose tensors are read to a device: they are unpacked or rounded there."""

    def __init__(self, base: WeightSource, device: torch.device) -> None:
        self._base = base
        self._device = device

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._base.tensors

    def read(self, name: str) -> Tensor:
        return self._base.read(name).to(self._device)

    def release(self, name: str) -> None:
        self._base.release(name)


class Loader:
    """Reads one checkpoint for one backend; `finish` refuses tensors that nobody asked for."""

    def __init__(
        self,
        source: WeightSource,
        ops: Ops,
        progress: Progress | None = None,
        *,
        packing: Packing | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """`packing`: the checkpoint's, where it is quantized. `rounding`: of one that isn't."""
        self.source = source
        self.ops = ops
        self.packing = packing
        self.rounding = rounding
        self._progress = progress
        self._total = sum(info.num_bytes for info in source.tensors.values())
        self._done = 0
        self._used: set[str] = set()

    def linear(
        self, prefixes: Sequence[str], shape: tuple[int, int], has_bias: bool, rows: Sequence[int] | None = None
    ) -> PreparedLinear:
        """The matrices `prefixes` stacked by output rows, [n, k] = `shape` together; `rows`: a new
        order of the rows of the only matrix."""
        weights = [self._weight(prefix, shape[1]) for prefix in prefixes]
        num_rows = sum(weight.shape[0] for weight in weights)
        if num_rows != shape[0]:
            raise CheckpointError(
                f"{' + '.join(prefixes)}: {num_rows} output rows in the checkpoint, the config implies {shape[0]}"
            )
        bias = torch.cat([self.vector(f"{prefix}.bias") for prefix in prefixes]) if has_bias else None
        if not has_bias:
            self._check_no_bias(prefixes)
        if rows is not None:
            index = torch.tensor(rows, device=next(iter(weights[0].tensors.values())).device)
            weights = [weights[0].format.select_rows(weights[0], index)]
            bias = None if bias is None else bias[index]
        prepared = self.ops.prepare_linear(weights, bias)
        self._release(*prefixes)
        return prepared

    def embedding(self, prefix: str, shape: tuple[int, int]) -> PreparedLinear:
        weight = self._weight(prefix, shape[1])
        if weight.shape[0] < shape[0]:
            raise CheckpointError(
                f"{prefix}: {weight.shape[0]} rows in the checkpoint, the config's vocabulary has {shape[0]}"
            )
        prepared = self.ops.prepare_embedding(weight)
        self._release(prefix)
        return prepared

    def vector(self, name: str, size: int | None = None) -> Tensor:
        """A one-dimensional tensor as float32 on the backend's device."""
        info = self.source.tensors.get(name)
        if info is None:
            raise CheckpointError(f"the checkpoint lacks the tensor '{name}'")
        if len(info.shape) != 1 or (size is not None and info.shape[0] != size):
            raise CheckpointError(f"{name} has shape {list(info.shape)}; the config implies [{size or 'n'}]")
        self._used.add(name)
        self._advance(info.num_bytes)
        return self.source.read(name).to(self.ops.device, torch.float32, copy=True)

    def has(self, name: str) -> bool:
        return name in self.source.tensors

    def finish(self, ignored: Sequence[str] = ()) -> None:
        """Refuse tensors that no layer asked for, but for module names in `ignored`."""
        left = [
            name
            for name in self.source.tensors
            if name not in self._used
            and not name.endswith(_IGNORED_SUFFIXES)
            and not any(name.startswith(f"{prefix}.") for prefix in ignored)
        ]
        if left:
            shown = ", ".join(sorted(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise CheckpointError(f"the checkpoint holds tensors that the model has no place for: {shown}")

    def _weight(self, prefix: str, in_features: int) -> Weight:
        reader = find_reader(self.source, prefix, self.packing)
        is_changed = reader is self.packing or self.rounding is not None
        weight = reader.load(DeviceSource(self.source, self.ops.device) if is_changed else self.source, prefix)
        if weight.shape[1] != in_features:
            raise CheckpointError(
                f"{prefix}: {weight.shape[1]} input columns in the checkpoint, the config implies {in_features}"
            )
        return weight if self.rounding is None else self.rounding.round(weight, prefix)

    def _check_no_bias(self, prefixes: Sequence[str]) -> None:
        """Some quantized checkpoints hold zeros where the model has no bias."""
        for name in (f"{prefix}.bias" for prefix in prefixes):
            if self.has(name) and self.vector(name).any():
                raise CheckpointError(f"the checkpoint holds the bias {name}, which the config rules out")

    def _release(self, *prefixes: str) -> None:
        for name, info in self.source.tensors.items():
            if name.rpartition(".")[0] in prefixes and name not in self._used:
                self._used.add(name)
                self._advance(info.num_bytes)
                self.source.release(name)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)
