"""What the row kernels share: how they are launched, and how they read the result of a matrix product.

Programmatic dependent launch (compute capability 9.0 and newer): a kernel's programs may start while the
kernel before it still runs. Each reads only constants and what the step began with, waits for that kernel,
then allows the next one to start; so a chain of small kernels pays for no launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """The keyword arguments of a launch that switch programmatic dependent launch on where there is such a thing."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Before this, a program reads only constants and what the step began with, and writes nothing. The next kernel may
    start at once, as it awaits this one: by then a product has asked for its first weights."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def load_sum(pointers, mask, part_stride, NUM_PARTS: tl.constexpr):
    """float32 sums over the parts, in their order."""
    total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(pointers + part * part_stride, mask=mask, other=0.0)
    return total


def layout_of_parts(x: Tensor) -> tuple[int, int, int, int]:
    """Of partial sums [p, t, n] or a finished [t, n]: p, t, and the strides of part and row, in elements."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1, "rows must be contiguous"
    if x.dim() == 3:
        assert x.shape[0] == 1 or x.dtype == torch.float32, "partial sums are float32"
        return x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    return 1, x.shape[0], 0, x.stride(0)
