"""Linear layers over few rows: `kernels/linear.cu`, and what calls it.

t  rows of x    n, k  out and in features    p  parts that k was split into    f = n / 2
"""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.eight_bit import EightBitMatrix
from turbolm.ops.cuda.int4 import Int4Matrix
from turbolm.ops.cuda.launch import Kernel, Launch, shared_memory
from turbolm.ops.cuda.plan import DENSE, Gpu, Output, Plan, Tile, Unit, plan_linear

Matrix = Tensor | Int4Matrix | EightBitMatrix  # [n, k]: in the dtype of x, or quantized

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class Arguments(ctypes.Structure):
    """As the kernel declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "out", "scales")),
        *((name, ctypes.c_int) for name in ("x_stride", "t", "n", "k")),
        *((name, ctypes.c_int) for name in ("tiles", "tiles_extra", "units", "units_extra")),
        ("resident", ctypes.c_int),
        *((f"prefetch_{name}", ctypes.c_int) for name in ("first_tile", "tiles", "first_unit", "units")),
        ("code_mask", ctypes.c_uint),
    )


@functools.cache
def supports(t: int, n: int, k: int, dtype: torch.dtype, unit: Unit = DENSE) -> bool:
    """Whether the functions below take x [t, k] and w [n, k] on the current GPU: up to 64 rows, k a multiple
    of 64 (of 4 bits: of 128), bfloat16 or float16."""
    if dtype not in (torch.bfloat16, torch.float16) or cuda_kernels_error() is not None:
        return False
    gpu = gpu_of(torch.cuda.current_device())
    return all(plan_linear(t, n, k, output, gpu, unit) is not None for output in Output)


def takes(t: int, matrix: Matrix) -> bool:
    """`supports`, of a matrix."""
    dtype = matrix.dtype if isinstance(matrix, Tensor) else torch.bfloat16  # quantized: as well as float16
    return supports(t, *matrix.shape, dtype, unit_of(matrix))


def linear_parts(x_tk: Tensor, weight: Matrix, bias_n: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias → [p, t, n] float32, to be summed over p; or finished, [t, n] in the dtype of x."""
    plan = plan_for(x_tk, weight, Output.PARTS)
    output = Output.PARTS if plan.splits > 1 else Output.ELEMENTS
    shape = (x_tk.shape[0], weight.shape[0])
    if plan.splits > 1:
        out = x_tk.new_empty((plan.splits, *shape), dtype=torch.float32)
    else:
        out = x_tk.new_empty(shape)
    run(plan, output, x_tk, weight, bias_n, out)
    return out


def linear_gated(x_tk: Tensor, weight: Matrix, activation: Literal["silu", "gelu", "gelu_tanh"]) -> Tensor:
    """activation(x @ first half of weight.T) * (x @ second half of weight.T) → [t, f] in the dtype of x."""
    out = x_tk.new_empty((x_tk.shape[0], weight.shape[0] // 2))
    run(plan_for(x_tk, weight, Output.GATED), Output.GATED, x_tk, weight, None, out, activation)
    return out


def linear_logits(x_tk: Tensor, weight: Matrix, out_tn: Tensor | None = None) -> Tensor:
    """x @ weight.T → [t, n] float32, into `out_tn` (contiguous) if given."""
    if out_tn is None:
        out_tn = x_tk.new_empty((x_tk.shape[0], weight.shape[0]), dtype=torch.float32)
    run(plan_for(x_tk, weight, Output.FLOATS), Output.FLOATS, x_tk, weight, None, out_tn)
    return out_tn


@functools.cache
def gpu_of(device_index: int) -> Gpu:
    """What plans need to know of a device."""
    return Gpu(torch.cuda.get_device_properties(device_index).multi_processor_count, *shared_memory(device_index))


def plan_for(x_tk: Tensor, weight: Matrix, output: Output) -> Plan:
    """The layout for these matrices; EngineError where `supports` is false."""
    (t, k), n = x_tk.shape, weight.shape[0]
    plan = plan_linear(t, n, k, output, gpu_of(x_tk.get_device()), unit_of(weight))
    if plan is None:
        raise EngineError(f"no kernel for x [{t}, {k}] and w [{n}, {k}]: `supports` was not asked")
    return plan


def run(
    plan: Plan,
    output: Output,
    x_tk: Tensor,
    weight: Matrix,
    bias_n: Tensor | None,
    out: Tensor,
    activation: str = "silu",
    *,
    overlap: bool = True,
) -> None:
    """Launches a plan. weight, bias, out: contiguous; weight and bias constant, as they may be read while
    earlier kernels run. overlap: see `Launch`."""
    if x_tk.stride(1) != 1 or x_tk.stride(0) % 8 or x_tk.data_ptr() % 16:
        x_tk = x_tk.contiguous()
    own = stored(weight)
    assert own.is_contiguous() and out.is_contiguous() and own.data_ptr() % 16 == 0
    assert own is not weight or own.dtype == x_tk.dtype
    assert bias_n is None or bias_n.dtype == x_tk.dtype
    assert weight.shape[1] == x_tk.shape[1]
    device_index = x_tk.get_device()
    # The activation makes no difference but to the gated kernel.
    number = ACTIVATIONS[activation] if output is Output.GATED else 0
    launch = _launch(plan, output, number, x_tk.dtype, device_index, overlap)
    arguments = launch.arguments
    arguments.x = x_tk.data_ptr()
    arguments.w = own.data_ptr()
    arguments.bias = None if bias_n is None else bias_n.data_ptr()
    arguments.out = out.data_ptr()
    arguments.scales = weight.scales.data_ptr() if isinstance(weight, EightBitMatrix) else None
    arguments.x_stride = x_tk.stride(0)
    arguments.t = x_tk.shape[0]
    arguments.n, arguments.k = weight.shape
    launch(device_index)


def unit_of(matrix: Matrix) -> Unit:
    """Of the layout that its kernels read."""
    return DENSE if isinstance(matrix, Tensor) else matrix.unit


def stored(weight: Matrix) -> Tensor:
    """What a matrix takes of memory, but for its scales."""
    if isinstance(weight, Int4Matrix):
        return weight.units
    return weight.codes if isinstance(weight, EightBitMatrix) else weight


@functools.cache
def _launch(
    plan: Plan, output: Output, activation: int, dtype: torch.dtype, device_index: int, overlap: bool
) -> Launch:
    arguments = plan_arguments(plan)
    kernel = _kernel(plan.tile, output, activation, dtype, device_index)
    overlap = overlap and torch.cuda.get_device_capability(device_index) >= (9, 0)
    grid = (plan.groups, plan.splits)
    shared_bytes = plan.asked_bytes(gpu_of(device_index))
    return Launch(kernel, grid, plan.tile.num_threads, shared_bytes, arguments, overlap=overlap)


@functools.cache
def _kernel(tile: Tile, output: Output, activation: int, dtype: torch.dtype, device_index: int) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device_index)
    defines = kernel_defines(tile, output, activation, dtype)
    cubin = compile_cubin(KERNELS / "linear.cu", defines, f"sm_{major}{minor}")
    return Kernel(cubin, "linear", device_index, gpu_of(device_index).shared_per_cta)


def kernel_defines(tile: Tile, output: Output, activation: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros that make a variant of the kernel. activation: its number, for Output.GATED."""
    return {
        "ELEMENT_FP16": int(dtype == torch.float16),
        "TOKENS": tile.tokens,
        "WARPS_M": tile.warps_m,
        "WARPS_K": tile.warps_k,
        "TILES_M": tile.tiles_m,
        "DEPTH": tile.depth,
        "MIN_CTAS": tile.min_ctas,
        "OUTPUT": int(output),
        "ACTIVATION": activation,
        "WEIGHTS": tile.unit.weights,
        "GROUPS": tile.unit.groups,
    }


def plan_arguments(plan: Plan) -> Arguments:
    """The arguments that a plan settles."""
    tiles, tiles_extra = divmod(plan.num_tiles, plan.groups)
    units, units_extra = divmod(plan.num_units, plan.splits)
    names = ("prefetch_first_tile", "prefetch_tiles", "prefetch_first_unit", "prefetch_units")
    return Arguments(
        tiles=tiles,
        tiles_extra=tiles_extra,
        units=units,
        units_extra=units_extra,
        resident=plan.resident,
        code_mask=0x000F000F,
        **dict(zip(names, plan.prefetch, strict=True)),
    )
