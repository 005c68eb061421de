"""The matrix kernels on random weights of any format: GB/s of weights at one row, GOP/s at more.

    python benchmarks/cpu_kernels.py [--threads 2] [--isa avx2] [--rows 1 8 16 512] [--only q4_1]

`turbolm bench kernels` does the same for the matrices of a model; here are shapes and formats that no model at hand
has, and lesser instruction sets.
"""

from __future__ import annotations

import argparse

import torch

from turbolm.bench.limits import measure_limits
from turbolm.bench.products import Product, time_product
from turbolm.ops.cpu import library
from turbolm.ops.cpu.matmul import FORMATS as CODES
from turbolm.ops.hardware import probe
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


def random_weight(name: str, n: int, k: int) -> Weight:
    weight_format = FORMATS[name]
    if weight_format.block_size == 1:
        return Weight(weight_format, (n, k), {"data": torch.randn(n, k).to(weight_format.storage_dtype)})
    width = k // weight_format.block_size * weight_format.block_width
    return Weight(weight_format, (n, k), {"data": torch.randint(16, 50, (n, width), dtype=torch.uint8)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=probe().physical_cores)
    parser.add_argument("--isa", default="", help="one of TURBOLM_ISA's; default: the best")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 512])
    parser.add_argument("--only", default="", choices=["", *CODES])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    options = parser.parse_args()
    if not library.select_isa(options.isa):
        parser.error(f"{options.isa} kernels don't run here; this machine's best are {library.isa()}")
    team = library.Team(options.threads)
    limits = measure_limits(options.threads)
    print(f"{library.isa()}, {options.threads} threads; reading memory: {limits.read[options.threads] / 1e9:.1f} GB/s")
    print(f"PyTorch's products: int8 {limits.int8 / 1e9:.0f} GOP/s, float32 {limits.float32 / 1e9:.0f} GOP/s")
    print(f"{'':34} rows {options.rows}; GOP/s from 2 on")
    for label, name, n, k in SHAPES:
        if options.only not in ("", name):
            continue
        timings = time_product(Product(label, [random_weight(name, n, k)]), options.rows, team, options.seconds)
        cells = [
            f"{timing.bytes_per_second / 1e9:5.1f} GB/s {timing.seconds * 1e6:7.1f} µs"
            if timing.rows == 1
            else f"{timing.operations_per_second / 1e9:6.0f}"
            for timing in timings or ()
        ]
        print(f"{label:17} {name:5} {n:6} x {k:<5}", "  ".join(cells) or "no kernels", flush=True)


if __name__ == "__main__":
    main()
