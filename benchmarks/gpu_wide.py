"""Products with 16-bit weights of 17 to 256 rows: `kernels/wide.cu` beside cuBLAS.

    python benchmarks/gpu_wide.py [--rows 24 32 48 64 96 128 192] [--out wide.json]

The layers of a Llama-3-8B shape. Each layout is checked against torch, and timed as a CUDA graph that goes through
copies of the weights larger than the L2 cache; cuBLAS with what it needs beside: the gate's activation. Then 32 layers
of different weights in order, in which kernels overlap as in a model. A wrong layout is named and left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_linear import make, microseconds
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.cuda import wide
from turbolm.ops.cuda.linear import gpu_of
from turbolm.ops.cuda.plan import DENSE, Output
from turbolm.ops.cuda.wide import DENSE_TILE, WidePlan, WideTile, plan_wide
from turbolm.ops.triton.rows import activate_multiply

SHAPES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
LAYERS = 32
ROTATION = 150 << 20  # bytes of weights that a graph goes through at least
MEMORY = 4.55e6  # bytes per microsecond of an H200
TILES = (
    *(DENSE_TILE, WideTile(32, 1, 18), WideTile(32, 2, 10), WideTile(64, 2, 9), WideTile(64, 4, 5)),
    *(WideTile(128, 1, 9), WideTile(128, 2, 7), WideTile(128, 4, 4), WideTile(256, 2, 4)),
)


def output_of(name: str) -> Output:
    return {"gate_up": Output.GATED, "head": Output.FLOATS}.get(name, Output.ELEMENTS)


def candidates(t: int, n: int, k: int) -> list[WidePlan]:
    """The chosen one first, then others of the same or the next width."""
    gpu = gpu_of(0)
    found = [plan_wide(t, n, k, DENSE, gpu)]
    for tile in TILES:
        if not (t <= tile.tokens < 4 * t or (tile.tokens in (128, 256) and t > 128)):
            continue
        row_tiles, token_tiles = -(-n // (64 * tile.warpgroups)), -(-t // tile.tokens)
        tiles = row_tiles * token_tiles
        for grid in {gpu.num_sms, min(tiles, gpu.num_sms), gpu.num_sms // tiles * tiles or gpu.num_sms}:
            plan = WidePlan(tile, grid, row_tiles, token_tiles, k // DENSE.k)
            if plan not in found and tile.shared_bytes(DENSE) <= gpu.shared_per_cta:
                found.append(plan)
    return found


def empty(name: str, t: int, n: int) -> Tensor:
    dtype = torch.float32 if name == "head" else torch.bfloat16
    return torch.empty(t, n // 2 if name == "gate_up" else n, dtype=dtype, device="cuda")


def library(name: str, x: Tensor, w: Tensor, out: Tensor) -> None:
    if name == "head":
        torch.mm(x, w.T, out_dtype=torch.float32, out=out)
    elif name == "gate_up":
        activate_multiply(F.linear(x, w), "silu", out)
    else:
        torch.mm(x, w.T, out=out)


def error_of(name: str, x: Tensor, w: Tensor, out: Tensor) -> float:
    expected = F.linear(x, w).float() if name == "head" else F.linear(x.float(), w.float())
    if name == "gate_up":
        half = expected.shape[1] // 2
        expected = F.silu(expected[:, :half]) * expected[:, half:]
    return float((out.float() - expected).abs().max() / expected.abs().max())


def time_product(name: str, t: int) -> dict[str, Any]:
    n, k = SHAPES[name]
    matrices = [make(n, k) / k**0.5 for _ in range(max(2, -(-ROTATION // (n * k * 2))))]
    x, out = make(t, k), empty(name, t, n)
    theirs = microseconds(lambda: [library(name, x, w, out) for w in matrices] and None, len(matrices))
    times: list[tuple[float, WidePlan]] = []
    for plan in candidates(t, n, k):
        try:
            out.fill_(torch.nan)
            wide.run(plan, output_of(name), x, matrices[0], None, out)
            error = error_of(name, x, matrices[0], out)
            if not error < 0.02:
                print(f"WRONG {error:.3g}: {name} t={t} {plan}", flush=True)
                continue
            work = lambda p=plan: [wide.run(p, output_of(name), x, w, None, out) for w in matrices] and None  # noqa: E731
            times.append((microseconds(work, len(matrices)), plan))
        except EngineError as failure:
            print(f"failed: {name} t={t} {plan}: {failure}", flush=True)
    if not times:
        return {"cublas": theirs, "times": []}
    chosen, best = times[0][0], sorted(times, key=lambda entry: entry[0])[:3]
    floor = n * k * 2 / MEMORY
    print(f"{name} t={t}: floor {floor:.1f}, cuBLAS {theirs:.2f}, chosen {chosen:.2f}, best {best[0][0]:.2f} us")
    for duration, plan in best:
        print(f"   {duration:.2f} {plan.tile} grid {plan.grid}", flush=True)
    return {"cublas": theirs, "times": [(duration, str(plan)) for duration, plan in times], "best": best[0][1]}


def time_layers(t: int, best: dict[str, WidePlan | None]) -> None:
    names = list(SHAPES)[:4]
    layers = [{name: make(*SHAPES[name]) / SHAPES[name][1] ** 0.5 for name in names} for _ in range(LAYERS)]
    x = {name: make(t, SHAPES[name][1]) for name in names}

    def run(product: Callable[[str, Tensor, Tensor], None]) -> float:
        return microseconds(
            lambda: [product(name, x[name], w) for layer in layers for name, w in layer.items()] and None, 1
        )

    def own(plans: dict[str, WidePlan | None]) -> Callable[[str, Tensor, Tensor], None]:
        def product(name: str, x: Tensor, w: Tensor) -> None:
            out, plan = empty(name, t, w.shape[0]), plans[name]
            if plan is None:
                library(name, x, w, out)
            else:
                wide.run(plan, output_of(name), x, w, None, out)

        return product

    chosen = {name: plan_wide(t, *SHAPES[name], DENSE, gpu_of(0)) for name in names}
    kinds = {"cuBLAS": dict.fromkeys(names), "chosen": chosen, "best": best}
    found = {label: run(own(plans)) / 1e3 for label, plans in kinds.items()}
    print(f"32 layers t={t}: " + ", ".join(f"{label} {ms:.3f}" for label, ms in found.items()), "ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[24, 32, 48, 64, 96, 128, 192])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tiles = [(tile, output) for tile in TILES for output in set(map(output_of, SHAPES))]
    with ThreadPoolExecutor(16, initializer=torch.cuda.set_device, initargs=(0,)) as pool:  # compiled ahead, together
        list(pool.map(lambda pair: wide._kernel(pair[0], DENSE, pair[1], 0, torch.bfloat16, 0), tiles))
    record: dict[str, Any] = {}
    for t in options.rows:
        found = {name: time_product(name, t) for name in SHAPES}
        faster = {
            name: entry["best"] if entry["times"] and min(entry["times"])[0] < entry["cublas"] else None
            for name, entry in found.items()
        }
        time_layers(t, faster)
        record[str(t)] = {name: {"cublas": entry["cublas"], "times": entry["times"]} for name, entry in found.items()}
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
