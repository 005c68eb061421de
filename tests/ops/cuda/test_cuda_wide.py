"""The kernel for many rows: its own source, run on the CPU by emulator.cpp, against plain products; and its plans."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from turbolm.ops.cuda import wide
from turbolm.ops.cuda.compiler import KERNELS
from turbolm.ops.cuda.int4 import pack
from turbolm.ops.cuda.linear import stored, unit_of
from turbolm.ops.cuda.plan import DENSE, INT4, Gpu, Output
from turbolm.ops.cuda.wide import WidePlan, WideTile
from turbolm.quant.int4 import int4

B, H = torch.bfloat16, torch.float16
H200 = Gpu(132, 232_448, 233_472)


def emulate(
    folder: Path, plan: WidePlan, output: Output, x: torch.Tensor, w: wide.Matrix, bias: torch.Tensor | None, order: int
) -> torch.Tensor:
    """What the kernel leaves in its output, NaN where it writes nothing."""
    for name in ("wide.cu", "activation.cuh", "int4.cuh"):
        shutil.copy(KERNELS / name, folder)
    for name in ("ptx.cuh", "wgmma.cuh"):  # the emulator brings its own
        (folder / name).write_text("")
    defines = wide.kernel_defines(plan.tile, unit_of(w), output, 0, x.dtype)
    source, path = Path(__file__).parent / "emulator.cpp", folder / "emulator.so"
    command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run([*command, str(source), "-o", str(path)], check=True)
    t, (n, k) = x.shape[0], w.shape
    width, dtype = (n // 2 if output is Output.GATED else n), (torch.float32 if output is Output.FLOATS else x.dtype)
    out = torch.full((t, width), float("nan"), dtype=dtype)
    partials = torch.full((plan.grid, plan.tile.partial_bytes // 4), float("nan"))
    flags = torch.zeros(plan.grid, dtype=torch.int32)
    arguments = wide.plan_arguments(plan)
    arguments.x, arguments.w, arguments.out = x.data_ptr(), stored(w).data_ptr(), out.data_ptr()
    arguments.bias = None if bias is None else bias.data_ptr()
    arguments.partials, arguments.flags = partials.data_ptr(), flags.data_ptr()
    arguments.x_stride, arguments.t, arguments.n, arguments.k = x.stride(0), t, n, k
    x_bytes = ((t - 1) * x.stride(0) + k) * 2
    sizes = [ctypes.c_long(size) for size in (plan.tile.shared_bytes(unit_of(w)), x_bytes, stored(w).nbytes)]
    ctypes.CDLL(str(path)).emulate(ctypes.byref(arguments), plan.grid, 1, *sizes, order)
    assert not flags.any()  # for the next launch
    return out


CASES = {
    # (tile, group size, output, t, n, k, CTAs, dtype)
    "a tile per CTA": (WideTile(32, 1, 4), 128, Output.ELEMENTS, 27, 128, 384, 2, B),
    "tiles cut, a ragged one": (WideTile(16, 1, 3), 64, Output.FLOATS, 16, 144, 512, 5, H),
    "several CTAs in a tile": (WideTile(16, 1, 4), 128, Output.FLOATS, 9, 64, 896, 4, B),
    "two tiles of tokens, small groups": (WideTile(16, 2, 4, 4), 32, Output.ELEMENTS, 21, 160, 256, 3, B),
    "gated": (WideTile(32, 1, 3), 256, Output.GATED, 30, 192, 512, 2, H),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_multiplies(name: str, tmp_path: Path) -> None:
    tile, group, output, t, n, k, grid, dtype = CASES[name]
    generator = torch.Generator().manual_seed(n * k)
    x = torch.randn(t, k + 8, generator=generator).to(dtype)[:, :k]  # rows further apart than they are long
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) / k**0.5).to(dtype)
    zeros = torch.randint(0, 17, (n, k // group), dtype=torch.uint8, generator=generator)
    bias = torch.randn(n, generator=generator).to(dtype) if output is Output.ELEMENTS else None
    packed = pack(codes, scales, zeros)
    plan = WidePlan(tile, grid, -(-n // (64 * tile.warpgroups)), -(-t // tile.tokens), k // 128)
    out = emulate(tmp_path, plan, output, x, packed, bias, 1 if t % 2 else -1)
    w = int4(codes, scales, zeros).dequantize(dtype)  # the kernel rounds weights to elements, too
    expected = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if output is Output.GATED:
        expected = F.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
    assert not out.isnan().any()
    precision = 2e-5 if output is Output.FLOATS else torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, rtol=precision, atol=precision)


DENSE_CASES = {
    # (tile, output, t, n, k, CTAs, dtype)
    "a tile per CTA": (WideTile(32, 1, 4), Output.ELEMENTS, 27, 128, 192, 2, B),
    "tiles cut, a ragged one": (WideTile(16, 1, 3), Output.FLOATS, 16, 144, 320, 5, H),
    "several CTAs in a tile, two warpgroups": (WideTile(32, 2, 4), Output.FLOATS, 25, 160, 448, 4, B),
    "two tiles of tokens": (WideTile(16, 2, 4), Output.ELEMENTS, 21, 160, 256, 3, B),
    "gated": (WideTile(64, 1, 3), Output.GATED, 50, 192, 256, 2, H),
}


@pytest.mark.parametrize("name", DENSE_CASES)
def test_the_kernel_multiplies_by_16_bits(name: str, tmp_path: Path) -> None:
    tile, output, t, n, k, grid, dtype = DENSE_CASES[name]
    generator = torch.Generator().manual_seed(n * k)
    x = torch.randn(t, k + 8, generator=generator).to(dtype)[:, :k]
    w = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if output is Output.ELEMENTS else None
    plan = WidePlan(tile, grid, -(-n // (64 * tile.warpgroups)), -(-t // tile.tokens), k // 64)
    out = emulate(tmp_path, plan, output, x, w, bias, 1 if t % 2 else -1)
    expected = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if output is Output.GATED:
        expected = F.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
    assert not out.isnan().any()
    precision = 2e-5 if output is Output.FLOATS else torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, rtol=precision, atol=precision)


@given(t=st.integers(17, 1000), n=st.integers(1, 3000), k=st.integers(1, 300))
def test_plans_for_16_bits_fit_the_gpu_and_give_every_cta_items(t: int, n: int, k: int) -> None:
    plan = wide.plan_wide(t, 16 * n, 64 * k, DENSE, H200)
    arguments = wide.plan_arguments(plan)
    assert 1 <= plan.grid <= H200.num_sms and arguments.share >= 1
    assert arguments.share * plan.grid + arguments.share_extra == plan.num_items
    assert plan.row_tiles * plan.tile.warpgroups * 4 >= n and plan.token_tiles * plan.tile.tokens >= t
    assert plan.tile.shared_bytes(DENSE) <= H200.shared_per_cta and plan.tile is wide.DENSE_TILE


@given(t=st.integers(1, 5000), n=st.integers(1, 3000), k=st.integers(1, 300), group=st.sampled_from(list(INT4)))
def test_plans_fit_the_gpu_and_give_every_cta_items(t: int, n: int, k: int, group: int) -> None:
    unit = INT4[group]
    plan = wide.plan_wide(t, 16 * n, 128 * k, unit, H200)
    arguments = wide.plan_arguments(plan)
    assert 1 <= plan.grid <= H200.num_sms and arguments.share >= 1
    assert arguments.share * plan.grid + arguments.share_extra == plan.num_items
    assert plan.row_tiles * plan.tile.warpgroups * 4 >= n and plan.token_tiles * plan.tile.tokens >= t
    assert plan.tile.shared_bytes(unit) <= H200.shared_per_cta and plan.tile in wide.TILES


@pytest.mark.parametrize(("t", "tokens"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1000, 128)])
def test_tiles_are_no_larger_than_x(t: int, tokens: int) -> None:
    assert wide.plan_wide(t, 4096, 4096, INT4[128], H200).tile.tokens == tokens


def test_tiles_are_cut_alike_where_sums_cost_more_than_idle_ctas() -> None:
    """32 tiles of 128 rows: 128 CTAs have a quarter of one each; 132 would cut each into 6 parts."""
    plan = wide.plan_wide(64, 4096, 4096, INT4[128], H200)
    assert plan.grid == 128 and plan.num_items % plan.grid == 0
