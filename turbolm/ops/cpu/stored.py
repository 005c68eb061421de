"""Packed matrices as tensors and back, for `turbolm convert`."""

from __future__ import annotations

import functools
import hashlib

import torch

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.ops import Ops, PreparedLinear
from turbolm.ops.cpu.matmul import FORMATS, PackedLinear, PackedMatrix, pack_rows
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.stored import StoredLinear


class CpuLayout:
    """csrc/pack.h, the same for all instruction sets (an `ops.stored.Layout`)."""

    has_tables = True

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what packing makes of known bytes, in every format."""
        digest = hashlib.sha256()
        rows = (torch.arange(16 * 1024) * 37 % 251).to(torch.uint8).view(16, 1024)  # 256 columns of any format
        for name, code in FORMATS.items():
            digest.update(name.encode() + pack_rows(code, rows, 256).numpy().tobytes())
        return digest.hexdigest()[:16]

    def make_ops(self, dtype: torch.dtype, threads: int, rank: int, size: int) -> Ops:
        del dtype  # activations are float32
        assert size == 1 and rank == 0, "the CPU's kernels run in one process"
        return CpuOps(threads=threads)

    def store(self, linear: PreparedLinear) -> StoredLinear:
        if not isinstance(linear, PackedLinear):
            raise UnsupportedModelError("the CPU's kernels have no layout for weights of this format: load it as it is")
        tensors = {f"part{i}": part.data for i, part in enumerate(linear.parts)}
        if linear.bias is not None:
            tensors["bias"] = linear.bias
        about = {"k": linear.in_features, "parts": [[part.format, part.n] for part in linear.parts]}
        return StoredLinear(about, tensors)

    def restore(self, stored: StoredLinear, ops: Ops) -> PreparedLinear:
        del ops
        k, parts = stored.about["k"], []
        for i, (code, n) in enumerate(stored.about["parts"]):
            part, data = PackedMatrix(code, n, k), stored.tensors[f"part{i}"]
            if data.dtype != torch.uint8 or data.shape != part.data.shape:
                raise CheckpointError(f"{data.dtype} {list(data.shape)} is no packed {n} x {k} matrix")
            part.data.copy_(data)  # from the mapped file to huge pages, by all threads
            parts.append(part)
        return PackedLinear(k, parts, stored.tensors.get("bias"))
