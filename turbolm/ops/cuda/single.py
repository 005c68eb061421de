"""Linear layers with weights of 4 bits over one row: `kernels/single.cu`, and what calls it.

n, k  out and in features    p  parts that k was split into    f = n / 2
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.int4 import Int4Matrix
from turbolm.ops.cuda.launch import Kernel, Launch
from turbolm.ops.cuda.linear import ACTIVATIONS, gpu_of
from turbolm.ops.cuda.plan import Gpu, Output, Unit

_CAPABILITY = (9, 0)  # bulk copies
_UNITS = 4  # of x that a warp's registers hold; with several groups of k to a unit one less
_WARPS = (8, 16)  # of a CTA: beside 16 there is no room for the next kernel
_STAGES = 2
_ROUNDS = 4

# Microseconds, of an H200.
_UNIT = 0.235  # a warp's unit, with memory at its limit
_ALONE = 2.0  # of a kernel that can't share SMs with the one before
_PART = 0.15  # what another part costs its consumer


class Arguments(ctypes.Structure):
    """As the kernel declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "out")),
        *((name, ctypes.c_int) for name in ("n", "k", "tiles", "tiles_extra", "units", "units_extra")),
        ("code_mask", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class SingleTile:
    """A variant of the kernel."""

    warps_m: int  # that row tiles are dealt out to
    warps_k: int  # that share a CTA's units of k
    units: int  # of k that a warp has, at most
    stages: int = _STAGES  # row tiles in flight per warp
    rounds: int = _ROUNDS  # row tiles of a warp between two times that sums are added up

    @property
    def num_warps(self) -> int:
        return self.warps_m * self.warps_k

    @property
    def min_ctas(self) -> int:
        """That an SM's registers must hold: 128 per thread."""
        return 16 // self.num_warps

    @property
    def sum_bytes(self) -> int:
        return 2 * self.num_warps * self.rounds * 16 * 4

    def ring_bytes(self, unit: Unit) -> int:
        barriers = -(-self.num_warps * self.stages * 8 // 128) * 128
        return barriers + self.num_warps * self.stages * self.units * unit.num_bytes


@dataclass(frozen=True, slots=True)
class SinglePlan:
    """One launch. CTA (g, s) computes the g-th share of the row tiles over the s-th share of the units of k; the first
    shares are one larger where they can't be equal."""

    tile: SingleTile
    groups: int
    splits: int
    num_tiles: int  # of 16 rows of w (gated: 8 and 8)
    num_units: int  # of k
    unit: Unit

    @property
    def cta_tiles(self) -> int:
        """At most."""
        return -(-self.num_tiles // self.groups)

    @property
    def cta_units(self) -> int:
        """At most."""
        return -(-self.num_units // self.splits)

    @property
    def shared_bytes(self) -> int:
        return self.tile.ring_bytes(self.unit) + self.tile.sum_bytes + self.cta_units * self.unit.k * 2

    @property
    def microseconds(self) -> float:
        """An estimate, whose differences count."""
        work = -(-self.cta_tiles // self.tile.warps_m) * self.tile.units * self.tile.num_warps / _WARPS[0]
        return work * _UNIT + (self.splits - 1) * _PART + (_ALONE if self.tile.min_ctas == 1 else 0.0)


@functools.cache
def plan_single(n: int, k: int, output: Output, gpu: Gpu, unit: Unit) -> SinglePlan | None:
    """The best layout for w [n, k]; None where the kernel doesn't run. With one split, parts are elements."""
    num_tiles, num_units = n // 16, k // unit.k
    most = _UNITS if unit.groups == 1 else _UNITS - 1
    plans = []
    for warps in _WARPS:
        for splits in range(1, gpu.num_sms + 1 if output is Output.PARTS else 2):
            cta_units = -(-num_units // splits)
            warps_k = next((count for count in (1, 2, 4, 8, 16) if count * most >= cta_units), warps + 1)
            if warps_k > warps or splits > num_units:
                continue
            tile = SingleTile(warps // warps_k, warps_k, -(-cta_units // warps_k))
            groups = min(num_tiles, gpu.num_sms // splits)
            plans.append(SinglePlan(tile, groups, splits, num_tiles, num_units, unit))
    fitting = [plan for plan in plans if plan.shared_bytes <= gpu.shared_per_cta]
    return min(fitting, key=lambda plan: plan.microseconds, default=None)


@functools.cache
def _supports_device(device_index: int) -> bool:
    return cuda_kernels_error() is None and torch.cuda.get_device_capability(device_index) >= _CAPABILITY


def takes(x_tk: Tensor, weight: Int4Matrix) -> bool:
    """Whether the functions below multiply x by it: one row, on a GPU of compute capability 9.0 or later."""
    if x_tk.shape[0] != 1 or not x_tk.is_cuda or not _supports_device(x_tk.get_device()):
        return False
    return all(_plan(weight, output, x_tk.get_device()) is not None for output in Output)


def single_parts(x_1k: Tensor, weight: Int4Matrix, bias_n: Tensor | None) -> Tensor:
    """x @ weight.T + bias → [p, 1, n] float32, to be summed over p; or finished, [1, n] in the dtype of x."""
    plan = _plan_for(weight, Output.PARTS, x_1k.get_device())
    if plan.splits == 1:
        out = x_1k.new_empty((1, weight.shape[0]))
    else:
        out = x_1k.new_empty((plan.splits, 1, weight.shape[0]), dtype=torch.float32)
    run(plan, Output.ELEMENTS if plan.splits == 1 else Output.PARTS, x_1k, weight, bias_n, out)
    return out


def single_gated(x_1k: Tensor, weight: Int4Matrix, activation: Literal["silu", "gelu", "gelu_tanh"]) -> Tensor:
    """activation(x @ first half of weight.T) * (x @ second half of weight.T) → [1, f] in the dtype of x."""
    out = x_1k.new_empty((1, weight.shape[0] // 2))
    run(_plan_for(weight, Output.GATED, x_1k.get_device()), Output.GATED, x_1k, weight, None, out, activation)
    return out


def single_logits(x_1k: Tensor, weight: Int4Matrix, out_1n: Tensor) -> None:
    """x @ weight.T into float32 `out_1n`."""
    run(_plan_for(weight, Output.FLOATS, x_1k.get_device()), Output.FLOATS, x_1k, weight, None, out_1n)


def _plan(weight: Int4Matrix, output: Output, device_index: int) -> SinglePlan | None:
    return plan_single(*weight.shape, output, gpu_of(device_index), weight.unit)


def _plan_for(weight: Int4Matrix, output: Output, device_index: int) -> SinglePlan:
    plan = _plan(weight, output, device_index)
    if plan is None:
        raise EngineError(f"no kernel for one row and w {list(weight.shape)}: `takes` was not asked")
    return plan


def run(
    plan: SinglePlan,
    output: Output,
    x_1k: Tensor,
    weight: Int4Matrix,
    bias_n: Tensor | None,
    out: Tensor,
    activation: str = "silu",
    *,
    overlap: bool = True,
) -> None:
    """Launches a plan. weight, bias, out: contiguous; weight constant, as it may be read while earlier kernels run."""
    if x_1k.stride(1) != 1 or x_1k.data_ptr() % 16:
        x_1k = x_1k.contiguous()
    assert weight.units.is_contiguous() and weight.units.data_ptr() % 16 == 0 and out.is_contiguous()
    assert x_1k.shape == (1, weight.shape[1]) and (bias_n is None or bias_n.dtype == x_1k.dtype)
    device_index = x_1k.get_device()
    number = ACTIVATIONS[activation] if output is Output.GATED else 0
    launch = _launch(plan, output, number, x_1k.dtype, device_index, overlap)
    arguments = launch.arguments
    arguments.x, arguments.w, arguments.out = x_1k.data_ptr(), weight.units.data_ptr(), out.data_ptr()
    arguments.bias = None if bias_n is None else bias_n.data_ptr()
    arguments.n, arguments.k = weight.shape
    launch(device_index)


@functools.cache
def _launch(
    plan: SinglePlan, output: Output, activation: int, dtype: torch.dtype, device_index: int, overlap: bool
) -> Launch:
    kernel = _kernel(plan.tile, plan.unit, output, activation, dtype, device_index)
    # More than half of an SM's: no SM may have two of this kernel's CTAs while another has none (`plan.needs_sm`), as
    # happens beside kernels that leave some SMs sooner. Of Llama-2-7B, one row, 32 layers: 588 tokens/s, else 488.
    shared_bytes = max(plan.shared_bytes, gpu_of(device_index).shared_per_sm // 2)
    grid, num_threads = (plan.groups, plan.splits), 32 * plan.tile.num_warps
    return Launch(kernel, grid, num_threads, shared_bytes, plan_arguments(plan), overlap=overlap)


@functools.cache
def _kernel(
    tile: SingleTile, unit: Unit, output: Output, activation: int, dtype: torch.dtype, device_index: int
) -> Kernel:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device_index))
    defines = kernel_defines(tile, unit, output, activation, dtype)
    cubin = compile_cubin(KERNELS / "single.cu", defines, architecture)
    return Kernel(cubin, "single", device_index, gpu_of(device_index).shared_per_cta)


def kernel_defines(tile: SingleTile, unit: Unit, output: Output, activation: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros that make a variant of the kernel. activation: its number, for Output.GATED."""
    return {
        "ELEMENT_FP16": int(dtype == torch.float16),
        "WARPS_M": tile.warps_m,
        "WARPS_K": tile.warps_k,
        "UNITS": tile.units,
        "STAGES": tile.stages,
        "ROUNDS": tile.rounds,
        "MIN_CTAS": tile.min_ctas,
        "OUTPUT": int(output),
        "ACTIVATION": activation,
        "GROUPS": unit.groups,
    }


def plan_arguments(plan: SinglePlan) -> Arguments:
    """The arguments that a plan settles."""
    tiles, tiles_extra = divmod(plan.num_tiles, plan.groups)
    units, units_extra = divmod(plan.num_units, plan.splits)
    return Arguments(tiles=tiles, tiles_extra=tiles_extra, units=units, units_extra=units_extra, code_mask=0x000F000F)
