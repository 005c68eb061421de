"""The backend's class keeps the contract that the engine asks it for."""

from __future__ import annotations

import torch

from turbolm.ops import DeviceOps, Ops
from turbolm.ops.cuda.ops import CudaOps
from turbolm.ops.reference import ReferenceOps


def test_it_is_run_as_a_device_that_computes_on_its_own() -> None:
    ops = CudaOps(torch.device("cpu"), torch.bfloat16)
    assert isinstance(ops, DeviceOps)
    reference: Ops = ReferenceOps(torch.device("cpu"), torch.float32)
    assert not isinstance(reference, DeviceOps)
