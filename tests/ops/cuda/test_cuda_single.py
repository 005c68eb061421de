"""The kernel for one row and weights of 4 bits: its source, run on the CPU by emulator.cpp, against plain products."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from turbolm.ops.cuda.compiler import KERNELS
from turbolm.ops.cuda.int4 import pack
from turbolm.ops.cuda.plan import INT4, Gpu, Output
from turbolm.ops.cuda.single import SinglePlan, SingleTile, kernel_defines, plan_arguments, plan_single
from turbolm.quant.int4 import int4


def build(folder: Path, defines: dict[str, int]) -> ctypes.CDLL:
    """The kernel and the emulator as a library."""
    for name in ("single.cu", "activation.cuh", "int4.cuh", "words.cuh"):
        shutil.copy(KERNELS / name, folder)
    (folder / "ptx.cuh").write_text("")  # the emulator brings its own
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    source, library = Path(__file__).parent / "emulator.cpp", folder / "emulator.so"
    command = ["c++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", f"-I{folder}", *macros]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def emulate(folder: Path, plan: SinglePlan, output: Output, x, units, n: int, bias, order: int) -> torch.Tensor:
    """What the kernel leaves in its output, NaN where it writes nothing."""
    k = x.shape[0]
    library = build(folder, kernel_defines(plan.tile, plan.unit, output, 0, x.dtype))
    shape, dtype = {
        Output.PARTS: ((plan.splits, n), torch.float32),
        Output.ELEMENTS: ((n,), x.dtype),
        Output.FLOATS: ((n,), torch.float32),
        Output.GATED: ((n // 2,), x.dtype),
    }[output]
    out = torch.full(shape, float("nan"), dtype=dtype)
    arguments = plan_arguments(plan)
    arguments.x, arguments.w, arguments.out = x.data_ptr(), units.data_ptr(), out.data_ptr()
    arguments.bias = None if bias is None else bias.data_ptr()
    arguments.n, arguments.k = n, k
    sizes = [ctypes.c_long(size) for size in (plan.shared_bytes, k * 2, units.numel())]
    library.emulate(ctypes.byref(arguments), plan.groups, plan.splits, *sizes, order)
    return out


B, H = torch.bfloat16, torch.float16
CASES = {
    # (tile, group size, output, n, k, groups, splits, dtype)
    "parts": (SingleTile(1, 2, 2, 2, 1), 128, Output.PARTS, 64, 768, 2, 2, B),
    "warps without units, a row's own scale": (SingleTile(1, 4, 1, 3, 2), 384, Output.PARTS, 96, 384, 1, 1, B),
    "small groups, a ragged pass": (SingleTile(2, 2, 2, 2, 2), 32, Output.FLOATS, 112, 512, 2, 1, B),
    "finished, with bias": (SingleTile(1, 2, 2, 4, 2), 64, Output.ELEMENTS, 80, 384, 2, 1, H),
    "gated": (SingleTile(2, 2, 3, 2, 1), 128, Output.GATED, 96, 640, 1, 1, B),
    "more warps than row tiles": (SingleTile(4, 2, 1, 2, 1), 128, Output.PARTS, 32, 512, 1, 2, H),
    "gated, small groups, three units": (SingleTile(1, 2, 3, 3, 2), 32, Output.GATED, 96, 640, 2, 1, H),
    "four units": (SingleTile(1, 2, 4, 3, 2), 896, Output.ELEMENTS, 96, 896, 2, 1, B),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_multiplies(name: str, tmp_path: Path) -> None:
    tile, group, output, n, k, groups, splits, dtype = CASES[name]
    generator = torch.Generator().manual_seed(n * k)
    x = torch.randn(k, generator=generator).to(dtype)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) / k**0.5).to(torch.float16)
    zeros = torch.randint(0, 17, (n, k // group), dtype=torch.uint8, generator=generator)
    bias = torch.randn(n, generator=generator).to(dtype) if output in (Output.PARTS, Output.ELEMENTS) else None
    packed = pack(codes, scales, zeros)
    plan = SinglePlan(tile, groups, splits, n // 16, k // 128, packed.unit)
    out = emulate(tmp_path, plan, output, x, packed.units, n, bias, 1 if n % 3 else -1)
    weight = int4(codes, scales, zeros).dequantize(torch.float32)
    expected = F.linear(x.float(), weight, None if bias is None else bias.float())
    if output is Output.GATED:
        expected = F.silu(expected[: n // 2]) * expected[n // 2 :]
    result = out.sum(0) if output is Output.PARTS else out
    assert not out.isnan().any()
    precision = 2e-5 if output in (Output.PARTS, Output.FLOATS) else torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=precision, atol=precision)


H200 = Gpu(132, 227 << 10, 228 << 10)
SHAPES = (
    *((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    *((5120, 5120), (27648, 5120), (5120, 27648), (48, 128)),
)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("output", Output)
def test_plans_cover_every_unit_and_fit_the_gpu(n: int, k: int, output: Output) -> None:
    plan = plan_single(n, k, output, H200, INT4[128])
    if plan is None:
        assert k > 64 * 128 and output is not Output.PARTS, "a row's k fits the registers of 16 warps"
        return
    assert plan.tile.units * plan.tile.warps_k >= plan.cta_units
    assert plan.groups <= plan.num_tiles and plan.splits <= plan.num_units
    assert plan.shared_bytes <= H200.shared_per_cta
    assert output is Output.PARTS or plan.splits == 1


@pytest.mark.parametrize(("n", "k"), SHAPES[:4])
def test_layers_of_7b_keep_every_sm_at_work(n: int, k: int) -> None:
    plan = plan_single(n, k, Output.GATED if n == 22016 else Output.PARTS, H200, INT4[128])
    assert plan is not None and plan.groups * plan.splits == H200.num_sms and plan.tile.num_warps == 8
