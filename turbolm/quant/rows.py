"""What the formats share whose matrix is one tensor of rows: dense ones and GGUF's blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from turbolm.errors import CheckpointError, ConfigError
from turbolm.weights import Weight, WeightSource


class RowFormat(ABC):
    """A matrix [n, k] as `tensors["data"]`: n rows, each of k / `block_size` blocks that stand
    for `block_size` elements and take `block_width` entries of the data tensor.

    So rows can be selected and stacked freely, columns split between blocks.
    """

    name: str
    is_dense: bool
    block_size: int  # elements of a block
    block_width: int  # entries of a row of data per block
    storage_dtype: torch.dtype  # of data

    def detect(self, source: WeightSource, prefix: str) -> bool:
        info = source.tensors.get(f"{prefix}.weight")
        return info is not None and info.dtype.lower() == self.name

    def load(self, source: WeightSource, prefix: str) -> Weight:
        """The matrix `prefix`.weight, as a view of the file where the source can give one."""
        name = f"{prefix}.weight"
        info = source.tensors.get(name)
        if info is None:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        if len(info.shape) != 2:
            raise CheckpointError(f"{name} has shape {list(info.shape)}; a matrix [n, k] is needed")
        n, k = info.shape
        if k % self.block_size:
            raise CheckpointError(f"{name}: rows of {k} elements are not whole {self.name} blocks of {self.block_size}")
        return self.pack(source.read(name), (n, k), name)

    def pack(self, data: Tensor, shape: tuple[int, int], name: str = "matrix") -> Weight:
        """`data` as a matrix of `shape`; `name` is for the error message."""
        width = shape[1] // self.block_size * self.block_width
        if data.dtype != self.storage_dtype or tuple(data.shape) != (shape[0], width):
            raise CheckpointError(
                f"{name}: {self.name} of shape {list(shape)} takes {self.storage_dtype} [{shape[0]}, {width}], "
                f"got {data.dtype} {list(data.shape)}"
            )
        return Weight(self, shape, {"data": data})

    def select_rows(self, weight: Weight, rows: Tensor) -> Weight:
        """A copy of these rows (int64 indices), in this order."""
        data = weight.tensors["data"]
        return Weight(self, (rows.numel(), weight.shape[1]), {"data": data.index_select(0, rows.to(data.device))})

    def shard(self, weight: Weight, dim: int, rank: int, size: int) -> Weight:
        """The rank-th of `size` equal parts: of rows (dim 0) a view, of columns (dim 1) a copy.
        Raises ConfigError where rows, or blocks of columns, don't divide by `size`."""
        n, k = weight.shape
        data = weight.tensors["data"]
        units = n if dim == 0 else k // self.block_size
        unit = "rows" if dim == 0 else f"columns ({units} {self.name} blocks of {self.block_size})"
        part = check_split(weight.shape, dim, size, units, unit)
        if dim == 0:
            return Weight(self, (part, k), {"data": data.narrow(0, rank * part, part)})
        width = part * self.block_width
        columns = data.narrow(1, rank * width, width).contiguous()
        return Weight(self, (n, part * self.block_size), {"data": columns})

    def concat(self, weights: Sequence[Weight]) -> Weight:
        k = weights[0].shape[1]
        assert all(weight.format is self and weight.shape[1] == k for weight in weights)
        data = torch.cat([weight.tensors["data"] for weight in weights])
        return Weight(self, (data.shape[0], k), {"data": data})

    @abstractmethod
    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """[n, k] in `dtype`."""


def check_split(shape: tuple[int, int], dim: int, size: int, units: int, unit: str) -> int:
    """Units of a part where `units` of dimension `dim` are split evenly over `size` devices. Raises ConfigError
    where they can't be."""
    if units % size:
        raise ConfigError(
            f"a {shape[0]} x {shape[1]} matrix can't be split over {size} devices along its {shape[dim]} {unit}; "
            f"choose a number of devices that divides {units}"
        )
    return units // size
