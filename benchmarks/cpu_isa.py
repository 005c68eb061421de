"""Every instruction set of this machine: are its products right, and how fast are they?

    python benchmarks/cpu_isa.py [--threads 16] [--isa amx avx512vnni] [--formats q4_k bf16] [--n 2048 --k 4096]

First each format's products on random weights, with each instruction set: the largest error, relative to
|x| · |Wᵀ| (x rounded to 8 bits may make 0.01 of it, to bf16 0.002), whether rows are bitwise the same in
batches of any size, and whether the set agrees bitwise with the one named. Then GB/s of weights
at one row, from copies that exceed the caches, and GOP/s at more. Ends with status 1 where a row depends
on its batch or an error is too large. Under a minute on 16 cores.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from turbolm.ops.cpu import instructions, library
from turbolm.ops.cpu.matmul import FORMATS as CODES
from turbolm.ops.cpu.matmul import PackedLinear, pack, workspace_bytes
from turbolm.ops.cpu.ops import CpuOps
from turbolm.quant import FORMATS
from turbolm.weights import Weight

CHECK_ROWS = 150
BATCHES = [(0, 1), (149, 1), (3, 2), (5, 7), (8, 8), (17, 16), (40, 31), (2, 33), (60, 64), (1, 129)]  # first, rows
#: Which sets give the same bits: all but the portable one; where weights are bf16, two sets round x.
APART = {"bf16": ("avx512bf16", "amx")}
TIMED = ["q4_0", "q4_1", "q4_k", "q6_k", "q8_0", "q2_k", "q3_k", "bf16", "f32"]
ROW_COUNTS = [1, 4, 8, 16, 32, 128, 512]
LARGEST_ERRORS = {"f32": 1e-5, "f16": 1e-5, "bf16": 0.002}  # 0.01 elsewhere
SECONDS = 0.07  # for one figure
COLD_BYTES = 160 << 20  # no cache holds them


def random_weight(name: str, n: int, k: int) -> Weight:
    """Random values, or random blocks with small scales of either sign."""
    weight_format = FORMATS[name]
    if weight_format.block_size == 1:
        return Weight(weight_format, (n, k), {"data": torch.randn(n, k).to(weight_format.storage_dtype)})
    data = torch.randint(0, 256, (n, k // weight_format.block_size, weight_format.block_width), dtype=torch.uint8)
    start = {"q2_k": 80, "q3_k": 108, "q6_k": 208}.get(name, 0)
    count = 2 if name in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k") else 1
    scales = (torch.randn(*data.shape[:2], count) * 0.01).half()
    data[:, :, start : start + 2 * count] = scales.view(torch.uint8)
    return Weight(weight_format, (n, k), {"data": data.view(n, -1)})


def packed(weight: Weight, bias: Tensor | None = None) -> PackedLinear:
    linear = pack([weight], bias)
    assert linear is not None
    return linear


def check(name: str, isas: list[str], ops: CpuOps) -> Iterator[tuple[str, bool]]:
    """(a line, whether all is well) for each set."""
    n, k = 83, 768 if FORMATS[name].block_size > 1 else 771
    weight = random_weight(name, n, k)
    x = torch.randn(CHECK_ROWS, k) * torch.rand(CHECK_ROWS, k) ** 3
    w = weight.dequantize(torch.float32).double()
    expected, magnitude = x.double() @ w.T, x.double().abs() @ w.abs().T
    linear = packed(weight)
    first: tuple[str, Tensor] | None = None
    for isa in isas:
        library.select_isa(isa)
        y = ops.linear(x, linear)
        error = ((y - expected).abs() / magnitude).max().item()
        is_invariant = all(torch.equal(ops.linear(x[start : start + rows].clone(), linear), y[start : start + rows])
                           for start, rows in BATCHES)  # fmt: skip
        agreement = ""
        if isa != "generic" and isa not in APART.get(name, ()):
            first = first or (isa, y)
            agreement = f"same as {first[0]}: {'yes' if torch.equal(y, first[1]) else 'NO'}"
        batches = "yes" if is_invariant else "NO"
        line = f"{name:7} {isa:11} error {error:.1e}   same in every batch: {batches:3}   {agreement}"
        yield line, is_invariant and error < LARGEST_ERRORS.get(name, 0.01) and not agreement.endswith("NO")


class Calls:
    """One native call that multiplies x with each matrix in turn."""

    def __init__(self, linears: list[PackedLinear], rows: int, team: library.Team) -> None:
        n, k = linears[0].out_features, linears[0].in_features
        x, y = torch.randn(rows, k), torch.empty(rows, n)
        workspace = torch.empty(workspace_bytes(k, rows, team.num_threads) + 64, dtype=torch.uint8)
        self._operations = [
            instructions.Linear(
                code=instructions.Linear.opcode,
                barrier=1,
                linear=linear.address,
                x=x.data_ptr(),
                y=y.data_ptr(),
                workspace=-(-workspace.data_ptr() // 64) * 64,
            )
            for linear in linears
        ]
        self._addresses = (ctypes.c_void_p * len(linears))(*map(ctypes.addressof, self._operations))
        self._step = instructions.Step(num_tokens=rows)
        self._keep = (x, y, workspace, linears)
        self._team = team

    def __call__(self) -> None:
        run = library.library().turbolm_run
        run(self._team.handle, self._addresses, len(self._operations), ctypes.byref(self._step))


def best_seconds(call: Callable[[], object]) -> float:
    """The shortest of the calls that fit SECONDS, two at least."""
    best, start, done = float("inf"), time.perf_counter(), 0
    while done < 2 or time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        done += 1
    return best


def speeds(linears: list[PackedLinear], isa: str, team: library.Team) -> str:
    """One line: GB/s at one row, GOP/s at the others; "-" where a figure would take too long."""
    library.select_isa(isa)
    n, k = linears[0].out_features, linears[0].in_features
    columns, rate = [], float("inf")
    for rows in ROW_COUNTS:
        operations = 2.0 * rows * n * k
        if 2 * operations / rate > 1.0:
            columns.append("      -")
            continue
        used = linears if rows == 1 else linears[: max(1, min(len(linears), int(2e9 / operations)))]
        seconds = best_seconds(Calls(used, rows, team)) / len(used)
        rate = operations / seconds
        columns.append(f"{(linears[0].num_bytes / seconds if rows == 1 else rate) / 1e9:7.1f}")
    return " ".join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", nargs="+", default=list(library.ISA_NAMES), choices=library.ISA_NAMES)
    parser.add_argument("--formats", nargs="+", default=None, choices=list(CODES))
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    isas = [name for name in options.isa if library.select_isa(name)]
    print(f"instruction sets here: {' '.join(isas)}; {options.threads} threads")
    ops = CpuOps(threads=options.threads)
    is_good = True
    for name in options.formats or CODES:
        for line, is_right in check(name, isas, ops):
            print(line if is_right else f"{line}   WRONG", flush=True)
            is_good = is_good and is_right
    if not options.check_only:
        print(f"\n{options.n} x {options.k}")
        print(f"{'':20} GB/s  GOP/s at rows")
        print(f"{'':19}" + " ".join(f"{rows:7}" for rows in ROW_COUNTS))
        for name in options.formats or TIMED:
            weight = random_weight(name, options.n, options.k)
            linears = [packed(weight)]
            while len(linears) * linears[0].num_bytes < COLD_BYTES:
                linears.append(packed(weight))
            for isa in isas:
                print(f"{name:7} {isa:11}{speeds(linears, isa, ops.team)}", flush=True)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
