"""The backend for a device."""

from __future__ import annotations

import torch

from turbolm.ops import Ops
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.reference import ReferenceOps


def select_ops(device: str, kernels: str, dtype: str, *, unpack: bool, threads: int) -> Ops:
    """The ops for `device` ("cpu", "cuda"): turbolm's own kernels where `kernels` is "native", else
    plain torch. `dtype`: of activations, as torch names it."""
    if device == "cpu":
        torch.set_num_threads(threads)
    activations: torch.dtype = getattr(torch, dtype)
    if kernels == "native" and device == "cpu":
        return CpuOps(threads=threads, unpack=unpack)
    if kernels == "native":
        from turbolm.ops.cuda.ops import CudaOps  # needs triton, which not every machine has

        return CudaOps(torch.device(device), activations)
    return ReferenceOps(torch.device(device), activations, unpack=unpack)
