"""Linear layers with weights of 4 or 16 bits over many rows: `kernels/wide.cu`, and what calls it.

t  rows of x    n, k  out and in features    f = n / 2
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.fallbacks import note_fallback
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.int4 import Int4Matrix
from turbolm.ops.cuda.launch import Kernel, Launch
from turbolm.ops.cuda.linear import ACTIVATIONS, gpu_of, stored, unit_of
from turbolm.ops.cuda.plan import DENSE, Gpu, Output, Unit, needs_sm

Matrix = Tensor | Int4Matrix  # [n, k]: in the dtype of x, or of 4 bits

_CAPABILITY = (9, 0)  # wgmma is of this architecture alone
_log = logging.getLogger(__name__)

# Microseconds and bytes of one SM, an H200's, fitted to the times of 74 layouts (docs/log.md; rms 5%).
_HBM = 34_500.0
_ITEM = 0.07
_UNPACK = 0.15  # of an item, per warpgroup: its steps follow each other
_PRODUCT = 0.25  # 64 rows by 128 tokens by 128 k
_PART = 0.65  # another CTA's sums: for them to be there,
_PART_BYTES = 140_000.0  # and to be read


class Arguments(ctypes.Structure):
    """As the kernel declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "out", "partials", "flags")),
        *((name, ctypes.c_int) for name in ("x_stride", "t", "n", "k", "token_tiles", "share", "share_extra")),
        ("code_mask", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class WideTile:
    """A variant of the kernel: 64 * warpgroups rows of w by `tokens` rows of x at once."""

    tokens: int
    warpgroups: int
    stages: int  # buffers, of an item each
    fragments: int = 2  # products under way per warpgroup

    @property
    def num_threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def partial_bytes(self) -> int:
        """Sums of a tile."""
        return 64 * self.warpgroups * self.tokens * 4

    def item_bytes(self, unit: Unit) -> int:
        return self.tokens * unit.k * 2 + 4 * self.warpgroups * unit.num_bytes

    def shared_bytes(self, unit: Unit) -> int:
        return self.stages * self.item_bytes(unit)


TILES = (
    WideTile(16, 2, 6),
    *(WideTile(32, warpgroups, 6) for warpgroups in (4, 2)),
    WideTile(64, 4, 4, 4),
    WideTile(64, 2, 6),
    *(WideTile(128, warpgroups, 4, 4) for warpgroups in (4, 2)),
)


#: For weights of 16 bits. A deep pipeline beats tall tiles, which read x less often (docs/log.md).
DENSE_TILE = WideTile(64, 1, 14)


@dataclass(frozen=True, slots=True)
class WidePlan:
    """One launch: `grid` CTAs that share the items of all tiles equally; the first shares may be one larger."""

    tile: WideTile
    grid: int
    row_tiles: int
    token_tiles: int
    units: int  # items of a tile

    @property
    def num_items(self) -> int:
        return self.row_tiles * self.token_tiles * self.units


def estimate(plan: WidePlan, unit: Unit, num_rows: int, gpu: Gpu) -> float:
    """Microseconds."""
    tile = plan.tile
    weights = num_rows // 16 * plan.units * unit.num_bytes
    item = _ITEM + tile.warpgroups * (_UNPACK + tile.tokens / 128 * _PRODUCT)
    share, is_uneven = -(-plan.num_items // plan.grid), plan.num_items % plan.grid
    others = min(plan.grid - 1, -(-plan.units // (plan.num_items // plan.grid)))  # that have part of a tile
    if not is_uneven and plan.units % share == 0:
        others = plan.units // share - 1
    parts = others * (_PART + tile.partial_bytes / _PART_BYTES)
    return max(share * item, weights / (_HBM * gpu.num_sms)) + parts


@functools.cache
def plan_wide(num_tokens: int, n: int, k: int, unit: Unit, gpu: Gpu) -> WidePlan:
    """The best layout for x [num_tokens, k] and w [n, k]; of 16 bits, the one there is."""
    if unit.is_dense:
        row_tiles, token_tiles = -(-n // (64 * DENSE_TILE.warpgroups)), -(-num_tokens // DENSE_TILE.tokens)
        num_tiles = row_tiles * token_tiles
        grid = gpu.num_sms // num_tiles * num_tiles or gpu.num_sms  # cuts all tiles alike, where that is possible
        return WidePlan(DENSE_TILE, min(grid, num_tiles * (k // unit.k)), row_tiles, token_tiles, k // unit.k)
    plans = []
    largest = max(tile.tokens for tile in TILES)
    tokens = next((tile.tokens for tile in TILES if tile.tokens >= num_tokens), largest)
    for tile in (tile for tile in TILES if tile.tokens == tokens):
        row_tiles, token_tiles = -(-n // (64 * tile.warpgroups)), -(-num_tokens // tokens)
        num_tiles = row_tiles * token_tiles
        num_items = num_tiles * (k // unit.k)
        # as many as can be; a tile each; as many as cut all tiles alike
        grids = (gpu.num_sms, num_tiles, gpu.num_sms // num_tiles * num_tiles or gpu.num_sms)
        for grid in {min(gpu.num_sms, num_items, grid) for grid in grids}:
            plans.append(WidePlan(tile, grid, row_tiles, token_tiles, k // unit.k))
    fitting = [plan for plan in plans if plan.tile.shared_bytes(unit) <= gpu.shared_per_cta]
    return min(fitting, key=lambda plan: estimate(plan, unit, n, gpu))


@functools.cache
def supports(device_index: int) -> bool:
    """Whether the device has the instructions, and the compiler knows them."""
    if cuda_kernels_error() is not None or torch.cuda.get_device_capability(device_index) != _CAPABILITY:
        return False
    try:
        _kernel(DENSE_TILE, DENSE, Output.ELEMENTS, 0, torch.bfloat16, device_index)
    except EngineError as error:
        note_fallback(_log, f"products of 17 rows and more are computed by cuBLAS: {error}")
        return False
    return True


def takes(matrix: Matrix) -> bool:
    """Whether the functions below multiply by it, on its device: n a multiple of 16, k of an item."""
    own, (n, k) = stored(matrix), matrix.shape
    is_kind = not isinstance(matrix, Tensor) or matrix.dtype in (torch.bfloat16, torch.float16)
    return is_kind and own.is_cuda and supports(own.get_device()) and n % 16 == 0 and k % unit_of(matrix).k == 0


@functools.cache
def scratch(device_index: int) -> tuple[Tensor, Tensor]:
    """What CTAs leave each other: (sums, flags), for any launch. Launches on one device follow each other."""
    num_sms, device = gpu_of(device_index).num_sms, torch.device("cuda", device_index)
    num_bytes = num_sms * max(tile.partial_bytes for tile in (*TILES, DENSE_TILE))
    sums = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return sums, torch.zeros(num_sms, dtype=torch.int32, device=device)


def wide_linear(x_tk: Tensor, weight: Matrix, bias_n: Tensor | None, out_tn: Tensor) -> None:
    """x @ weight.T + bias into `out_tn`, in the dtype of x or float32."""
    output = Output.FLOATS if out_tn.dtype == torch.float32 else Output.ELEMENTS
    _run(x_tk, weight, bias_n, out_tn, output, "silu")


def wide_gated(x_tk: Tensor, weight: Matrix, activation: Literal["silu", "gelu", "gelu_tanh"], out_tf: Tensor) -> None:
    """activation(x @ first half of weight.T) * (x @ second half of weight.T) into `out_tf`."""
    _run(x_tk, weight, None, out_tf, Output.GATED, activation)


def _run(x: Tensor, weight: Matrix, bias: Tensor | None, out: Tensor, output: Output, activation: str) -> None:
    plan = plan_wide(x.shape[0], *weight.shape, unit_of(weight), gpu_of(x.get_device()))
    run(plan, output, x, weight, bias, out, activation)


def run(
    plan: WidePlan,
    output: Output,
    x_tk: Tensor,
    weight: Matrix,
    bias_n: Tensor | None,
    out: Tensor,
    activation: str = "silu",
    *,
    overlap: bool = True,
) -> None:
    """Launches a plan. weight, bias, out: contiguous; weight constant, as it may be read while earlier kernels run."""
    if x_tk.stride(1) != 1 or x_tk.stride(0) % 8 or x_tk.data_ptr() % 16:
        x_tk = x_tk.contiguous()
    own = stored(weight)
    assert own.is_contiguous() and own.data_ptr() % 16 == 0
    assert own is not weight or own.dtype == x_tk.dtype
    assert out.is_contiguous() and x_tk.shape[1] == weight.shape[1]
    assert bias_n is None or bias_n.dtype == x_tk.dtype
    device_index = x_tk.get_device()
    number = ACTIVATIONS[activation] if output is Output.GATED else 0
    launch = _launch(plan, unit_of(weight), output, number, x_tk.dtype, device_index, overlap)
    arguments = launch.arguments
    arguments.x, arguments.w, arguments.out = x_tk.data_ptr(), own.data_ptr(), out.data_ptr()
    arguments.bias = None if bias_n is None else bias_n.data_ptr()
    arguments.x_stride, arguments.t = x_tk.stride(0), x_tk.shape[0]
    arguments.n, arguments.k = weight.shape
    launch(device_index)


@functools.cache
def _launch(
    plan: WidePlan, unit: Unit, output: Output, activation: int, dtype: torch.dtype, device_index: int, overlap: bool
) -> Launch:
    arguments = plan_arguments(plan)
    sums, flags = scratch(device_index)
    arguments.partials, arguments.flags = sums.data_ptr(), flags.data_ptr()
    kernel = _kernel(plan.tile, unit, output, activation, dtype, device_index)
    shared_bytes, gpu = plan.tile.shared_bytes(unit), gpu_of(device_index)
    if plan.tile.tokens == 16 or needs_sm(plan.grid, gpu):  # two of the smallest fit an SM
        shared_bytes = max(shared_bytes, gpu.shared_per_sm // 2)
    return Launch(kernel, (plan.grid, 1), plan.tile.num_threads, shared_bytes, arguments, overlap=overlap)


@functools.cache
def _kernel(
    tile: WideTile, unit: Unit, output: Output, activation: int, dtype: torch.dtype, device_index: int
) -> Kernel:
    cubin = compile_cubin(KERNELS / "wide.cu", kernel_defines(tile, unit, output, activation, dtype), "sm_90a")
    return Kernel(cubin, "wide", device_index, gpu_of(device_index).shared_per_cta)


def kernel_defines(tile: WideTile, unit: Unit, output: Output, activation: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros that make a variant of the kernel. activation: its number, for Output.GATED."""
    return {
        "ELEMENT_FP16": int(dtype == torch.float16),
        "TOKENS": tile.tokens,
        "WARPGROUPS": tile.warpgroups,
        "STAGES": tile.stages,
        "FRAGMENTS": tile.fragments,
        "OUTPUT": int(output),
        "ACTIVATION": activation,
        "GROUPS": unit.groups,
    }


def plan_arguments(plan: WidePlan) -> Arguments:
    """The arguments that a plan settles."""
    share, share_extra = divmod(plan.num_items, plan.grid)
    return Arguments(token_tiles=plan.token_tiles, share=share, share_extra=share_extra, code_mask=0x000F000F)
