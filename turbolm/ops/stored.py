"""Prepared matrices as tensors: written once, and read straight into the layout of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from turbolm.ops import Ops, PreparedLinear
    from turbolm.ops.sharded import ShardedOps


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A matrix in a backend's layout. `about`, in JSON's types, says what the tensors mean."""

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Layout(Protocol):
    """How a backend keeps matrices."""

    @property
    def fingerprint(self) -> str:
        """Of the layout: what has another one can't be read."""

    has_tables: bool
    """Whether embeddings, too, are in it; else they lie as in any checkpoint."""

    def make_ops(self, dtype: torch.dtype, threads: int, rank: int, size: int) -> Ops | ShardedOps:
        """Ops of a rank (of one: plain ones) that prepare matrices, on the host."""

    def store(self, linear: PreparedLinear) -> StoredLinear:
        """Raises UnsupportedModelError for a matrix that is in no layout."""

    def restore(self, stored: StoredLinear, ops: Ops) -> PreparedLinear:
        """Raises CheckpointError or KeyError where about and tensors don't fit."""
