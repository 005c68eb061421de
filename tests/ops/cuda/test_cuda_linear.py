"""The small-batch kernel's own source, run on the CPU by emulator.cpp, against plain products."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from turbolm.ops.cuda.compiler import KERNELS
from turbolm.ops.cuda.int4 import pack
from turbolm.ops.cuda.linear import kernel_defines, plan_arguments
from turbolm.ops.cuda.plan import FP8, INT8, TILES, Output, Plan, Tile
from turbolm.quant.int4 import int4

ACTIVATIONS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"))


def build(folder: Path, tile: Tile, output: Output, activation: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel and the emulator as a library."""
    for name in ("linear.cu", "activation.cuh", "int4.cuh", "weights.cuh", "words.cuh"):
        shutil.copy(KERNELS / name, folder)
    (folder / "ptx.cuh").write_text("")  # the emulator brings its own
    defines = [f"-D{name}={value}" for name, value in kernel_defines(tile, output, activation, dtype).items()]
    source, library = Path(__file__).parent / "emulator.cpp", folder / "emulator.so"
    command = ["c++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", f"-I{folder}", *defines]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def lay_out(tile: Tile, n: int, k: int, groups: int, splits: int, output: Output, *, resident: bool) -> Plan:
    tiles = -(-(n // 2) // 8) if output is Output.GATED else -(-n // 16)
    return Plan(tile, groups, splits, tiles, k // tile.unit.k, resident, prefetch_bytes=8192)


def emulate(
    folder: Path, plan: Plan, output: Output, x, w, bias, activation: int, order: int, scales=None
) -> torch.Tensor:
    """What the kernel leaves in its output, NaN where it writes nothing."""
    (t, k), n = x.shape, w.shape[0] * (16 if plan.tile.unit.groups else 1)
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
    arguments.scales = None if scales is None else scales.data_ptr()
    arguments.x_stride, arguments.t, arguments.n, arguments.k = x.stride(0), t, n, k
    x_bytes = ((t - 1) * x.stride(0) + k) * 2
    sizes = [ctypes.c_long(size) for size in (plan.shared_bytes, x_bytes, w.numel() * w.element_size())]
    library.emulate(ctypes.byref(arguments), plan.groups, plan.splits, *sizes, order)
    return out


def matrices(t: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(t * n + k)
    x = torch.randn(t, k + 8, generator=generator).to(dtype)[:, :k]  # rows further apart than they are long
    w = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    return x, w, torch.randn(n, generator=generator).to(dtype)


def quantized(n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes, scales (as float16 holds them) and zero points of every value."""
    generator = torch.Generator().manual_seed(n * k + group)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) / k**0.5).to(torch.float16)
    return codes, scales, torch.randint(0, 17, (n, k // group), dtype=torch.uint8, generator=generator)


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


INT4_CASES = {
    # (tile, group size, output, t, n, k, groups, splits, resident, dtype)
    "one token": (Tile(8, 1, 2, 2, 2), 128, Output.PARTS, 1, 64, 768, 2, 2, True, B),
    "a row's own scale, buffers in turn": (Tile(8, 2, 1, 2, 2), 1664, Output.PARTS, 5, 96, 1664, 1, 1, False, H),
    "small groups, a ragged pass": (Tile(16, 2, 2, 2, 2), 32, Output.FLOATS, 13, 112, 640, 2, 1, True, B),
    "finished, with bias": (Tile(16, 4, 1, 1, 2), 64, Output.ELEMENTS, 9, 80, 384, 1, 1, True, H),
    "gated, shared by warps": (Tile(8, 1, 4, 2, 2), 128, Output.GATED, 8, 96, 640, 1, 1, True, B),
    "sixteen warps": (Tile(8, 4, 4, 2, 3), 128, Output.PARTS, 6, 304, 1792, 2, 1, True, B),
    "gated, a warp each": (Tile(32, 4, 1, 1, 2), 64, Output.GATED, 31, 128, 512, 1, 1, False, H),
}


@pytest.mark.parametrize("name", INT4_CASES)
def test_the_kernel_multiplies_by_4_bits(name: str, tmp_path: Path) -> None:
    tile, group, output, t, n, k, groups, splits, resident, dtype = INT4_CASES[name]
    x, _, bias = matrices(t, n, k, dtype)
    codes, scales, zeros = quantized(n, k, group)
    packed = pack(codes, scales, zeros)
    w = int4(codes, scales, zeros).dequantize(torch.float32)
    has_bias = output in (Output.PARTS, Output.ELEMENTS)
    plan = lay_out(replace(tile, unit=packed.unit), n, k, groups, splits, output, resident=resident)
    out = emulate(tmp_path, plan, output, x, packed.units, bias if has_bias else None, 0, 1 if t % 2 else -1)
    expected = F.linear(x.float(), w, bias.float() if has_bias else None)
    if output is Output.GATED:
        expected = F.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
    result = out.sum(0) if output is Output.PARTS else out
    assert not out.isnan().any()
    precision = 2e-5 if output in (Output.PARTS, Output.FLOATS) else torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=precision, atol=precision)


EIGHT_BIT_CASES = {
    # (tile, unit, output, t, n, k, groups, splits, dtype)
    "int8, one token": (Tile(8, 2, 2, 1, 2), INT8, Output.PARTS, 1, 72, 768, 2, 2, B),
    "fp8, gated": (Tile(16, 1, 4, 1, 2), FP8, Output.GATED, 11, 80, 640, 2, 1, B),
    "int8 by float16": (Tile(8, 4, 1, 1, 2), INT8, Output.ELEMENTS, 7, 64, 384, 1, 1, H),
    "fp8 by float16, two tiles a warp": (Tile(64, 2, 1, 2, 2), FP8, Output.FLOATS, 34, 50, 256, 1, 1, H),
}


@pytest.mark.parametrize("name", EIGHT_BIT_CASES)
def test_the_kernel_multiplies_by_8_bits(name: str, tmp_path: Path) -> None:
    tile, unit, output, t, n, k, groups, splits, dtype = EIGHT_BIT_CASES[name]
    x, _, bias = matrices(t, n, k, dtype)
    codes = torch.arange(n * k).mul(37).add(5).remainder(256).to(torch.uint8).view(n, k)  # every code
    codes = codes.view(torch.int8) if unit is INT8 else codes.where(codes & 127 != 127, 3).view(torch.float8_e4m3fn)
    scales = torch.linspace(0.5, 1.5, n) / (100 * k**0.5)
    has_bias = output in (Output.PARTS, Output.ELEMENTS)
    plan = lay_out(replace(tile, unit=unit), n, k, groups, splits, output, resident=True)
    out = emulate(tmp_path, plan, output, x, codes, bias if has_bias else None, 0, 1, scales)
    expected = F.linear(x.float(), codes.float() * scales[:, None], bias.float() if has_bias else None)
    if output is Output.GATED:
        expected = F.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
    result = out.sum(0) if output is Output.PARTS else out
    assert not out.isnan().any()
    precision = 2e-5 if output in (Output.PARTS, Output.FLOATS) else torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=precision, atol=precision)
