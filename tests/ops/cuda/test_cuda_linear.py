"""The small-batch kernel's own source, run on the CPU by emulator.cpp, against plain products."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from turbolm.ops.cuda.compiler import KERNELS
from turbolm.ops.cuda.linear import kernel_defines, plan_arguments
from turbolm.ops.cuda.plan import TILES, Output, Plan, Tile

ACTIVATIONS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"))


def build(folder: Path, tile: Tile, output: Output, activation: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel and the emulator as a library."""
    shutil.copy(KERNELS / "linear.cu", folder)
    (folder / "ptx.cuh").write_text("")  # the emulator brings its own
    defines = [f"-D{name}={value}" for name, value in kernel_defines(tile, output, activation, dtype).items()]
    source, library = Path(__file__).parent / "emulator.cpp", folder / "emulator.so"
    command = ["c++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", f"-I{folder}", *defines]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def lay_out(tile: Tile, n: int, k: int, groups: int, splits: int, output: Output, *, resident: bool) -> Plan:
    tiles = -(-(n // 2) // 8) if output is Output.GATED else -(-n // 16)
    return Plan(tile, groups, splits, tiles, k // 64, resident, prefetch_bytes=8192)


def emulate(folder: Path, plan: Plan, output: Output, x, w, bias, activation: int, order: int) -> torch.Tensor:
    """What the kernel leaves in its output, NaN where it writes nothing."""
    (t, k), n = x.shape, w.shape[0]
    library = build(folder, plan.tile, output, activation, x.dtype)
    shape, dtype = {
        Output.PARTS: ((plan.splits, t, n), torch.float32),
        Output.ELEMENTS: ((t, n), x.dtype),
        Output.FLOATS: ((t, n), torch.float32),
        Output.GATED: ((t, n // 2), x.dtype),
    }[output]
    out = torch.full(shape, float("nan"), dtype=dtype)
    arguments = plan_arguments(plan)
    arguments.x, arguments.w, arguments.out = x.data_ptr(), w.data_ptr(), out.data_ptr()
    arguments.bias = None if bias is None else bias.data_ptr()
    arguments.x_stride, arguments.t, arguments.n, arguments.k = x.stride(0), t, n, k
    x_bytes = ((t - 1) * x.stride(0) + k) * 2
    sizes = [ctypes.c_long(size) for size in (plan.shared_bytes, x_bytes, w.numel() * 2)]
    library.emulate(ctypes.byref(arguments), plan.groups, plan.splits, *sizes, order)
    return out


def matrices(t: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(t * n + k)
    x = torch.randn(t, k + 8, generator=generator).to(dtype)[:, :k]  # rows further apart than they are long
    w = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    return x, w, torch.randn(n, generator=generator).to(dtype)


B, H = torch.bfloat16, torch.float16
CASES = {
    # (tile, output, t, n, k, groups, splits, resident, dtype)
    "one token": (TILES[0], Output.PARTS, 1, 64, 768, 3, 2, True, B),
    "buffers in turn, warps of all kinds": (TILES[2], Output.PARTS, 5, 168, 3392, 2, 2, False, B),
    "two passes, a ragged edge": (TILES[1], Output.FLOATS, 8, 90, 640, 2, 1, True, H),
    "finished, with bias": (TILES[4], Output.ELEMENTS, 13, 56, 576, 2, 1, True, B),
    "gated, shared by warps": (TILES[5], Output.GATED, 16, 116, 512, 2, 1, True, B),
    "gated, a warp each": (TILES[9], Output.GATED, 31, 216, 1152, 1, 1, False, H),
    "more units than slots": (TILES[8], Output.PARTS, 32, 48, 1344, 1, 1, True, H),
    "two tiles a warp": (TILES[13], Output.PARTS, 64, 392, 640, 1, 1, False, B),
    "seven warps": (TILES[14], Output.GATED, 40, 240, 576, 1, 1, False, B),
    "fewer units than warps": (TILES[0], Output.PARTS, 3, 16, 128, 1, 2, True, B),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_multiplies(name: str, tmp_path: Path) -> None:
    tile, output, t, n, k, groups, splits, resident, dtype = CASES[name]
    x, w, bias = matrices(t, n, k, dtype)
    has_bias = output in (Output.PARTS, Output.ELEMENTS)
    activation = n % 3 if output is Output.GATED else 0
    plan = lay_out(tile, n, k, groups, splits, output, resident=resident)
    out = emulate(tmp_path, plan, output, x, w, bias if has_bias else None, activation, 1 if t % 2 else -1)
    expected = F.linear(x.float(), w.float(), bias.float() if has_bias else None)
    if output is Output.GATED:
        expected = ACTIVATIONS[activation](expected[:, : n // 2]) * expected[:, n // 2 :]
    result = out.sum(0) if output is Output.PARTS else out
    assert not out.isnan().any()
    exact = output in (Output.PARTS, Output.FLOATS)
    precision = 2e-5 if exact else torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=precision, atol=2e-5 if exact else precision)
