"""The matrix kernels alone: GB/s of weights at one row, GOP/s at more, per shape and format.

    python benchmarks/cpu_kernels.py [--threads 2] [--isa avx2] [--rows 1 8 16 512] [--only q4_1]

Each shape exists in as many copies as exceed the caches, multiplied one after the other in one call, as
a model's layers are. Beside the figures: how fast PyTorch sums a large array, as the memory's limit.
Best of several short rounds, so that other load on the machine shows little.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable

import torch

from turbolm.ops.cpu import instructions, library
from turbolm.ops.cpu.matmul import FORMATS as CODES
from turbolm.ops.cpu.matmul import PackedLinear, pack, workspace_bytes
from turbolm.quant import FORMATS
from turbolm.weights import Weight

#: model, format, n, k
SHAPES = [
    ("SmolLM2 qkv", "q4_1", 960, 576),
    ("SmolLM2 out", "q4_1", 576, 576),
    ("SmolLM2 gate, up", "q4_1", 3072, 576),
    ("SmolLM2 down", "q4_1", 576, 1536),
    ("SmolLM2 head", "q8_0", 49152, 576),
    ("Qwen2.5 qkv", "q5_0", 1152, 896),
    ("Qwen2.5 gate, up", "q5_0", 9728, 896),
    ("Qwen2.5 down", "q6_k", 896, 4864),
    ("Qwen2.5 down", "q4_k", 896, 4864),
    ("Qwen2.5 head", "q8_0", 151936, 896),
    ("dense", "bf16", 2048, 2048),
    ("dense", "f16", 2048, 2048),
    ("dense", "f32", 2048, 2048),
]
COLD_BYTES = 160 << 20


def random_weight(name: str, n: int, k: int) -> Weight:
    weight_format = FORMATS[name]
    if weight_format.block_size == 1:
        return Weight(weight_format, (n, k), {"data": torch.randn(n, k).to(weight_format.storage_dtype)})
    width = k // weight_format.block_size * weight_format.block_width
    return Weight(weight_format, (n, k), {"data": torch.randint(16, 50, (n, width), dtype=torch.uint8)})


def best_seconds(call: Callable[[], object], rounds: int, limit: float) -> float:
    """The shortest of `rounds` calls, or of as many as fit `limit` seconds."""
    best, start = float("inf"), time.perf_counter()
    for done in range(rounds):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        if done >= 2 and time.perf_counter() - start > limit:
            break
    return best


def read_limit(threads: int) -> float:
    """GB/s."""
    torch.set_num_threads(threads)
    x = torch.ones(COLD_BYTES // 4)
    return COLD_BYTES / best_seconds(x.sum, 20, 1.0) / 1e9


class Calls:
    """One C call that multiplies x with each matrix in turn."""

    def __init__(self, linears: list[PackedLinear], rows: int, team: library.Team) -> None:
        n, k = linears[0].out_features, linears[0].in_features
        self._keep = [torch.randn(rows, k), torch.empty(rows, n)]
        workspace = torch.empty(workspace_bytes(k, rows, team.num_threads) + 64, dtype=torch.uint8)
        self._keep.append(workspace)
        self._operations = [
            instructions.Linear(
                code=instructions.Linear.opcode,
                barrier=1,
                linear=linear.address,
                x=self._keep[0].data_ptr(),
                y=self._keep[1].data_ptr(),
                workspace=-(-workspace.data_ptr() // 64) * 64,
            )
            for linear in linears
        ]
        self._addresses = (ctypes.c_void_p * len(linears))(*map(ctypes.addressof, self._operations))
        self._step = instructions.Step(num_tokens=rows)
        self._team = team

    def __call__(self) -> None:
        run = library.library().turbolm_run
        run(self._team.handle, self._addresses, len(self._operations), ctypes.byref(self._step))


def measure(name: str, n: int, k: int, rows: list[int], team: library.Team) -> str:
    weight = random_weight(name, n, k)
    start = time.perf_counter()
    first = pack([weight], None)
    pack_rate = weight.num_bytes / (time.perf_counter() - start) / 1e9
    assert first is not None
    linears = [first]
    while sum(linear.num_bytes for linear in linears) < COLD_BYTES and len(linears) < 512:
        copy = pack([weight], None)
        assert copy is not None
        linears.append(copy)
    columns = []
    for count in rows:
        operations = 2.0 * count * n * k
        used = linears if count == 1 else linears[: max(1, min(len(linears), int(4e8 / operations)))]
        seconds = best_seconds(Calls(used, count, team), 60, 2.0) / len(used)
        if count == 1:
            columns.append(f"{first.num_bytes / seconds / 1e9:5.1f} GB/s {seconds * 1e6:7.1f} µs")
        else:
            columns.append(f"{operations / seconds / 1e9:6.0f}")
    return "  ".join(columns) + f"   pack {pack_rate:4.2f} GB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--isa", default="", choices=["", "generic", "neon", "avx2", "avx512", "avx512vnni", "amx"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 512])
    parser.add_argument("--only", default="", choices=["", *CODES])
    options = parser.parse_args()
    if not library.select_isa(options.isa):
        parser.error(f"{options.isa} kernels don't run here; this machine's best are {library.isa()}")
    team = library.Team(options.threads)
    print(f"{library.isa()}, {options.threads} threads; reading memory: {read_limit(options.threads):.1f} GB/s")
    print(f"{'':34} rows {options.rows}; GOP/s from 2 on")
    for label, name, n, k in SHAPES:
        if options.only in ("", name):
            print(f"{label:17} {name:5} {n:6} x {k:<5}", measure(name, n, k, options.rows, team), flush=True)
    print(f"reading memory: {read_limit(options.threads):.1f} GB/s")


if __name__ == "__main__":
    main()
