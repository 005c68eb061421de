"""What the formats share that have integer codes and a scale for each group of a row's columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from turbolm.quant.dense import dense
from turbolm.quant.rows import check_split
from turbolm.weights import Weight

_CHUNK_ELEMENTS = 1 << 20  # unpacked at a time


class GroupedFormat(ABC):
    """A matrix [n, k] as tensors

    codes    [n, k / `codes_per_entry`]
    scales   floating point [n, k/g]; g: columns of a group, k for one group per row
    zeros    uint8 [n, k/g], where the format has zero points
    columns  int32 [k], optional: stored column j is input feature columns[j]; groups count stored columns
    """

    name: ClassVar[str]
    codes_per_entry: ClassVar[int]
    is_dense: ClassVar[bool] = False

    def select_rows(self, weight: Weight, rows: Tensor) -> Weight:
        """A copy of these rows (int64 indices), in this order."""
        index = rows.to(weight.tensors["codes"].device)
        tensors = {
            name: tensor if name == "columns" else tensor.index_select(0, index)
            for name, tensor in weight.tensors.items()
        }
        return Weight(self, (rows.numel(), weight.shape[1]), tensors)

    def shard(self, weight: Weight, dim: int, rank: int, size: int) -> Weight:
        """The rank-th of `size` equal parts: of rows (dim 0) views, of columns (dim 1) copies, which are dense
        where columns have an order. Raises ConfigError where rows, or groups of columns, don't divide by `size`."""
        n, k = weight.shape
        if dim == 0:
            part = check_split(weight.shape, 0, size, n, "rows")
            tensors = {
                name: tensor if name == "columns" else tensor.narrow(0, rank * part, part)
                for name, tensor in weight.tensors.items()
            }
            return Weight(self, (part, k), tensors)
        if "columns" in weight.tensors:  # each part has columns of all groups
            part = check_split(weight.shape, 1, size, k, "columns")
            return dense(weight.dequantize(weight.tensors["scales"].dtype).narrow(1, rank * part, part).contiguous())
        return self._shard_columns(weight, rank, size)

    def _shard_columns(self, weight: Weight, rank: int, size: int) -> Weight:
        n, k = weight.shape
        group = group_size(weight)
        num_units, unit = (k // group, f"{self.name} groups of {group}") if group < k else (k // 2, "pairs")
        part = check_split(weight.shape, 1, size, num_units, f"columns ({num_units} {unit})") * (k // num_units)

        def columns(name: str) -> Tensor:
            tensor = weight.tensors[name]
            if group == k and name != "codes":
                return tensor
            width = part * tensor.shape[1] // k
            return tensor.narrow(1, rank * width, width).contiguous()

        return Weight(self, (n, part), {name: columns(name) for name in weight.tensors})

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """Matrices with the same k, group size and column order, stacked by output rows."""
        first = weights[0]
        k, columns = first.shape[1], first.tensors.get("columns")
        for weight in weights:
            assert weight.format is self and weight.shape[1] == k and group_size(weight) == group_size(first)
            assert has_order(weight, columns), "stacked matrices have one order of columns"
        tensors = {
            name: tensor if name == "columns" else torch.cat([weight.tensors[name] for weight in weights])
            for name, tensor in first.tensors.items()
        }
        return Weight(self, (sum(weight.shape[0] for weight in weights), k), tensors)

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """[n, k]: computed in float32, rounded to `dtype`; columns are input features."""
        n, k = weight.shape
        tensors = weight.tensors
        scales, zeros = tensors["scales"], tensors.get("zeros")
        order = torch.argsort(tensors["columns"]) if "columns" in tensors else None
        result_nk = torch.empty((n, k), dtype=dtype, device=scales.device)
        step = max(1, _CHUNK_ELEMENTS // max(k, 1))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            values = self._values(tensors["codes"][rows]).view(-1, scales.shape[1], k // scales.shape[1])
            if zeros is not None:
                values = values - zeros[rows].float().unsqueeze(2)
            values = (values * scales[rows].float().unsqueeze(2)).view(-1, k)
            result_nk[rows] = values if order is None else values[:, order]
        return result_nk

    @abstractmethod
    def _values(self, codes: Tensor) -> Tensor:
        """Rows of codes → float32 [n, k]."""


def group_size(weight: Weight) -> int:
    """g: columns that share a scale."""
    return weight.shape[1] // int(weight.tensors["scales"].shape[1])


def has_order(weight: Weight, columns: Tensor | None) -> bool:
    """Whether the stored columns of `weight` are in this order."""
    own = weight.tensors.get("columns")
    if own is None or columns is None:
        return own is columns
    return torch.equal(own, columns)
