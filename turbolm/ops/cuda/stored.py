"""Matrices in the layout of the GPU's kernels as tensors and back, for `turbolm convert`."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, cast

import torch

from turbolm.errors import CheckpointError
from turbolm.ops import Ops, PreparedLinear
from turbolm.ops.cuda import int4
from turbolm.ops.cuda.eight_bit import EightBitMatrix
from turbolm.ops.cuda.ops import CudaOps
from turbolm.ops.cuda.sharded import ShardedCudaOps
from turbolm.ops.cuda.weights import DenseLinear, EightBitLinear, Int4Linear
from turbolm.ops.sharded import PartialLinear
from turbolm.ops.stored import StoredLinear


@dataclass(frozen=True, slots=True)
class _Alone:
    """The place of a rank whose matrices are prepared where no others are."""

    rank: int
    size: int


class CudaLayout:
    """`kernels/int4.cuh`, and rows (an `ops.stored.Layout`)."""

    has_tables = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what packing makes of known numbers."""
        digest = hashlib.sha256()
        codes = (torch.arange(32 * 64) * 37 % 251).to(torch.uint8).view(32, 64)
        for group in (32, 64, 128):
            scales = torch.linspace(0.1, 2.0, 32 * 128 // group).view(32, -1)
            digest.update(int4.pack(codes, scales, codes[:, : 128 // group] % 17).units.numpy().tobytes())
        return digest.hexdigest()[:16]

    def make_ops(self, dtype: torch.dtype, threads: int, rank: int, size: int) -> Ops:
        torch.set_num_threads(threads)
        host = torch.device("cpu")
        return CudaOps(host, dtype) if size == 1 else ShardedCudaOps(host, dtype, cast(Any, _Alone(rank, size)), 0, 0)

    def store(self, linear: PreparedLinear) -> StoredLinear:
        if isinstance(linear, PartialLinear):
            inner = self.store(linear.inner)
            return StoredLinear({**inner.about, "is_partial": True}, inner.tensors)
        assert isinstance(linear, DenseLinear | Int4Linear | EightBitLinear)
        tensors = {} if linear.bias is None else {"bias": linear.bias}
        if isinstance(linear, DenseLinear):
            return StoredLinear({"kind": "dense"}, {"weight": linear.weight, **tensors})
        if isinstance(linear, EightBitLinear):
            codes, scales = linear.matrix.codes, linear.matrix.scales
            return StoredLinear({"kind": "rows"}, {"codes": codes, "scales": scales, **tensors})
        if linear.columns is not None:
            tensors["columns"] = linear.columns
        return StoredLinear(
            {"kind": "int4", "group_size": linear.matrix.group_size}, {"units": linear.matrix.units, **tensors}
        )

    def restore(self, stored: StoredLinear, ops: Ops) -> PreparedLinear:
        assert isinstance(ops, CudaOps)
        linear = self._linear(stored, ops)
        return PartialLinear(linear) if stored.about.get("is_partial") else linear

    def _linear(self, stored: StoredLinear, ops: CudaOps) -> PreparedLinear:
        kind, tensors = stored.about["kind"], {name: ops.upload(tensor) for name, tensor in stored.tensors.items()}
        bias = tensors.get("bias")
        if kind == "dense":
            return DenseLinear(tensors["weight"], bias)
        if kind == "rows":
            return EightBitLinear(EightBitMatrix(tensors["codes"], tensors["scales"]), bias)
        if kind != "int4":
            raise CheckpointError(f"matrices of kind {kind!r} are unknown")
        matrix = int4.Int4Matrix(tensors["units"], stored.about["group_size"])
        return Int4Linear(matrix, bias, tensors.get("columns"))
