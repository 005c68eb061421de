"""`Weight`: a matrix in some format; the contracts of sources, formats, and how checkpoints pack matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's header entry."""

    name: str
    shape: tuple[int, ...]  # in elements, row-major: (n, k) for a matrix
    dtype: str  # as the file calls it: "F32", "BF16", "Q4_1", "I32" …
    num_bytes: int


class WeightSource(Protocol):
    """Named tensors on disk. Names are those of Hugging Face checkpoints; sources with other names
    (GGUF) translate."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor:
        """The tensor: a view of the mapped file wherever possible. Plain dtypes in their shape;
        block formats as uint8 [n, bytes per row]."""

    def release(self, name: str) -> None:
        """The tensor was copied elsewhere: its pages may leave memory."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix in one format."""

    format: WeightFormat
    shape: tuple[int, int]  # (n, k)
    tensors: Mapping[str, Tensor]  # the format's own names

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[n, k] in `dtype`."""
        return self.format.dequantize(self, dtype)


class WeightFormat(Protocol):
    """What a matrix's tensors mean."""

    @property
    def name(self) -> str:
        """As in messages and tables: "bf16", "q4_1"."""

    @property
    def is_dense(self) -> bool:
        """One number per element, no blocks."""

    def select_rows(self, weight: Weight, rows: Tensor) -> Weight:
        """Output rows in a new order, or some of them (int64 indices)."""

    def shard(self, weight: Weight, dim: int, rank: int, size: int) -> Weight:
        """The rank-th of `size` equal parts along output rows (0) or input columns (1)."""

    def concat(self, weights: Sequence[Weight]) -> Weight:
        """Matrices of this format with the same k, stacked by output rows."""

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """[n, k] in `dtype`."""


class WeightReader(Protocol):
    """How a matrix lies in a checkpoint."""

    def detect(self, source: WeightSource, prefix: str) -> bool:
        """Does `source` hold the matrix `prefix` (a module name, without ".weight") in this way?"""

    def load(self, source: WeightSource, prefix: str) -> Weight:
        """Raises CheckpointError, naming the tensor, where parts are missing or don't fit."""


class Packing(WeightReader, Protocol):
    """How a checkpoint packs its quantized matrices: what its quantization_config says."""

    @property
    def method(self) -> str:
        """`quant_method`: "awq", "gptq"."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that matrices may have once they are loaded."""

    @property
    def has_order(self) -> bool:
        """Columns may be stored in another order than the input's."""
