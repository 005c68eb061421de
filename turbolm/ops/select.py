"""The backend for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from turbolm.errors import UnsupportedModelError
from turbolm.ops import Ops
from turbolm.ops.cpu import library
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.cpu.stored import CpuLayout
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.sharded import ShardedOps, ShardedReferenceOps
from turbolm.ops.stored import Layout

if TYPE_CHECKING:
    from turbolm.ops.cuda.sharded import GpuCollectives


def select_ops(
    device: str, kernels: str, dtype: str, *, unpack: bool, threads: int, deterministic: bool = False
) -> Ops:
    """The ops for `device` ("cpu", "cuda"): turbolm's own kernels where `kernels` is "native", else
    plain torch. `dtype`: of activations, as torch names it. `deterministic`: a row's bits don't depend on
    other rows (native kernels)."""
    if device == "cpu":
        torch.set_num_threads(threads)
    activations: torch.dtype = getattr(torch, dtype)
    if kernels == "native" and device == "cpu":
        return CpuOps(threads=threads, unpack=unpack)
    if kernels == "native" and deterministic:
        from turbolm.ops.cuda.deterministic import DeterministicCudaOps  # needs triton, which not every machine has

        return DeterministicCudaOps(torch.device(device), activations)
    if kernels == "native":
        from turbolm.ops.cuda.ops import CudaOps  # needs triton, which not every machine has

        return CudaOps(torch.device(device), activations)
    return ReferenceOps(torch.device(device), activations, unpack=unpack)


def select_layout(device: str) -> Layout:
    """How turbolm's kernels for `device` keep matrices. Raises UnsupportedModelError where this machine can't tell."""
    if device == "cpu":
        if library.failure():
            raise UnsupportedModelError(f"turbolm's kernels for the CPU are missing: {library.failure()}")
        return CpuLayout()
    try:
        from turbolm.ops.cuda.stored import CudaLayout  # needs triton, which not every machine has
    except ImportError as error:
        raise UnsupportedModelError(f"layouts for GPUs need the package triton: {error}") from None
    return CudaLayout()


def select_sharded_ops(
    device: torch.device,
    kernels: str,
    dtype: str,
    collectives: GpuCollectives,
    vocab_size: int,
    hidden_size: int,
    *,
    deterministic: bool = False,
) -> ShardedOps:
    """The ops of one rank on its device. `vocab_size`: tokens that may be chosen. `deterministic`: see `select_ops`."""
    activations: torch.dtype = getattr(torch, dtype)
    if kernels == "native" and deterministic:
        from turbolm.ops.cuda.sharded_deterministic import ShardedDeterministicOps  # needs triton

        return ShardedDeterministicOps(device, activations, collectives, vocab_size, hidden_size)
    if kernels == "native":
        from turbolm.ops.cuda.sharded import ShardedCudaOps  # needs triton, which not every machine has

        return ShardedCudaOps(device, activations, collectives, vocab_size, hidden_size)
    return ShardedReferenceOps(device, activations, collectives, vocab_size)
