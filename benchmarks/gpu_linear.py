"""Linear layers over few rows on a GPU: right, and how far from the speed of memory.

    python benchmarks/gpu_linear.py --out results.json [--tokens 1 16] [--shapes 8B] [--alternatives 6]

Times are of CUDA graphs over copies of the weights that exceed the L2 cache together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbolm.ops.cuda import linear
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.plan import TILES, Gpu, Output, Plan, estimate, plan_linear

SHAPES = {
    "8B": {
        "qkv": (6144, 4096, Output.PARTS),
        "o": (4096, 4096, Output.PARTS),
        "gate_up": (28672, 4096, Output.GATED),
        "down": (4096, 14336, Output.PARTS),
        "head": (128256, 4096, Output.FLOATS),
    },
    "0.6B": {
        "qkv": (4096, 1024, Output.PARTS),
        "o": (1024, 2048, Output.PARTS),
        "gate_up": (6144, 1024, Output.GATED),
        "down": (1024, 3072, Output.PARTS),
        "head": (151936, 1024, Output.FLOATS),
    },
}
LAYERS = {"8B": 32, "0.6B": 28}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ROTATION = 300 << 20  # bytes of weights that a graph goes through at least


def make(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(0, scale)


def microseconds(work: Callable[[], None], launches: int) -> float:
    """Of one launch, where `work` makes `launches`: the median of replays of a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2] * 1000 / launches


def allocate(output: Output, splits: int, t: int, n: int, dtype: torch.dtype) -> tuple[Output, Tensor]:
    if output is Output.PARTS and splits == 1:
        output = Output.ELEMENTS
    shape = {Output.PARTS: (splits, t, n), Output.GATED: (t, n // 2)}.get(output, (t, n))
    kept = torch.float32 if output in (Output.PARTS, Output.FLOATS) else dtype
    return output, torch.full(shape, float("nan"), dtype=kept, device="cuda")


def compute(plan: Plan, output: Output, x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    output, out = allocate(output, plan.splits, x.shape[0], w.shape[0], x.dtype)
    linear.run(plan, output, x, w, bias, out, activation)
    return out.sum(0) if output is Output.PARTS else out.float()


def error_of(plan: Plan, output: Output, t: int, n: int, k: int, dtype: torch.dtype, activation: str) -> float:
    """Largest error, of the largest value."""
    x, w = make(t, k, dtype=dtype), make(n, k, scale=k**-0.5, dtype=dtype)
    bias = make(n, dtype=dtype) if output in (Output.PARTS, Output.ELEMENTS) else None
    expected = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if output is Output.GATED:
        expected = ACTIVATIONS[activation](expected[:, : n // 2]) * expected[:, n // 2 :]
    result = compute(plan, output, x, w, bias, activation)
    error = float((result - expected).abs().max() / expected.abs().max())
    return error if result.isfinite().all() else float("inf")


def check_variants(gpu: Gpu) -> int:
    """Every tile with every output, over shapes with ragged edges; both dtypes and every activation."""
    variants = [(tile, output) for tile in TILES for output in Output]
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    dtypes = [torch.bfloat16 if i % 3 else torch.float16 for i in range(len(variants))]
    names = [list(ACTIVATIONS)[i % 3] for i in range(len(variants))]

    def compile_one(i: int) -> None:
        activation = list(ACTIVATIONS).index(names[i]) if variants[i][1] is Output.GATED else 0
        defines = linear.kernel_defines(*variants[i], activation, dtypes[i])
        compile_cubin(KERNELS / "linear.cu", defines, architecture)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_one, range(len(variants))))
    wrong = 0
    for i, (tile, output) in enumerate(variants):
        n, k = 1000 + 8 * (i % 4), 64 * 37
        tiles = -(-n // 16)
        for resident, splits in ((True, 5), (False, 2)):
            splits = splits if output is Output.PARTS else 1
            plan = Plan(tile, min(tiles, gpu.num_sms // splits), splits, tiles, k // 64, resident)
            usable = resident or plan.cta_units > 3 * tile.slice_units
            if not usable or plan.shared_bytes > gpu.shared_per_cta:
                continue
            error = error_of(plan, output, tile.tokens - i % 3, n, k, dtypes[i], names[i])
            if error > 1e-2:
                wrong += 1
                print("WRONG", f"{error:.3g}", output.name, dtypes[i], names[i], plan)
    print(f"checked {len(variants)} variants, {wrong} wrong")
    return wrong


def time_plan(plan: Plan, output: Output, x: Tensor, weights: list[Tensor], *, overlap: bool = True) -> float:
    output, out = allocate(output, plan.splits, x.shape[0], weights[0].shape[0], x.dtype)

    def work() -> None:
        for w in weights:
            linear.run(plan, output, x, w, None, out, overlap=overlap)

    return microseconds(work, len(weights))


def alternatives(plan: Plan, output: Output, gpu: Gpu, count: int) -> list[Plan]:
    """The best by estimate of each tile and prefetch, beside the plan itself."""
    found = [replace(plan, prefetch_bytes=size) for size in (0, 32 << 10, 128 << 10, 256 << 10)]
    others = []
    for tile in (tile for tile in TILES if tile.tokens == plan.tile.tokens):
        for splits in range(1, 9 if output is Output.PARTS else 2):
            for per_sm in (1, 2):
                cta_tiles = -(-plan.num_tiles // min(plan.num_tiles, per_sm * gpu.num_sms // splits))
                groups = -(-plan.num_tiles // cta_tiles)
                for resident in (True, False):
                    other = Plan(tile, groups, splits, plan.num_tiles, plan.num_units, resident)
                    usable = resident or other.cta_units > 3 * tile.slice_units
                    if usable and other.shared_bytes <= gpu.shared_per_cta and (per_sm == 1 or other.shares_sm(gpu)):
                        others.append(other)
    others.sort(key=lambda other: estimate(other, output, gpu))
    best: dict[tuple[Any, ...], Plan] = {}
    for other in others:
        best.setdefault((other.tile, other.groups * other.splits > gpu.num_sms, other.resident), other)
    return found + [other for other in best.values() if other != plan][:count]


def describe(plan: Plan) -> str:
    tile = plan.tile
    return (
        f"{tile.warps_m}x{tile.warps_k}w m{tile.tiles_m} d{tile.depth} grid {plan.groups}x{plan.splits}"
        f"{' res' if plan.resident else ''} {plan.shared_bytes >> 10}K pf{plan.prefetch_bytes >> 10}K"
    )


def time_shape(model: str, name: str, tokens: list[int], gpu: Gpu, count: int) -> list[dict[str, Any]]:
    n, k, output = SHAPES[model][name]
    num_bytes = n * k * 2
    weights = [make(n, k, scale=k**-0.5) for _ in range(max(2, -(-ROTATION // num_bytes)))]
    results = []
    for t in tokens:
        plan = plan_linear(t, n, k, output, gpu)
        assert plan is not None
        x = make(t, k)
        error = error_of(plan, output, t, n, k, torch.bfloat16, "silu")
        ours, apart = (time_plan(plan, output, x, weights, overlap=overlap) for overlap in (True, False))
        theirs = microseconds(lambda x=x: [F.linear(x, w) for w in weights] and None, len(weights))
        rates = [num_bytes / time / 1e6 for time in (ours, apart, theirs)]
        result = {"model": model, "layer": name, "t": t, "error": error, "us": ours, "us_apart": apart}
        result |= {"us_torch": theirs, "estimate": estimate(plan, output, gpu), "plan": describe(plan)}
        print(
            f"{model:5}{name:8} t={t:<3} {'WRONG' if error > 1e-2 else f'{error:.0e}'} {ours:7.2f} us {rates[0]:5.2f} "
            f"TB/s | apart {apart:7.2f} {rates[1]:5.2f} | torch {theirs:7.2f} {rates[2]:5.2f} | {describe(plan)}"
        )
        if count and t in (1, 16, 32, 64):
            tried = []
            for other in alternatives(plan, output, gpu, count):
                tried.append((time_plan(other, output, x, weights), describe(other)))
            tried.sort()
            result["alternatives"] = tried
            for time, text in tried[:3]:
                print(f"{'':20} {time:7.2f} us  {text}")
        results.append(result)
    return results


def time_chain(model: str, tokens: list[int], gpu: Gpu) -> list[dict[str, Any]]:
    """All layers' matrices in order, without the kernels between them."""
    names = ("qkv", "o", "gate_up", "down")
    layers = [{name: make(*SHAPES[model][name][:2], scale=0.02) for name in names} for _ in range(LAYERS[model])]
    num_bytes = sum(w.numel() * 2 for layer in layers for w in layer.values())
    results = []
    for t in tokens:
        xs = {name: make(t, SHAPES[model][name][1]) for name in names}
        row: dict[str, Any] = {"model": model, "chain": LAYERS[model], "t": t}
        for label, prefetch, overlap in (("apart", 0, False), ("0K", 0, True), ("64K", 64, True), ("192K", 192, True)):
            plans, outs = {}, {}
            for name in names:
                n, k, output = SHAPES[model][name]
                plan = plan_linear(t, n, k, output, gpu)
                assert plan is not None
                plans[name] = replace(plan, prefetch_bytes=prefetch << 10)
                outs[name] = allocate(output, plan.splits, t, n, torch.bfloat16)

            def work(plans=plans, outs=outs, overlap=overlap, xs=xs) -> None:
                for layer in layers:
                    for name in names:
                        output, out = outs[name]
                        linear.run(plans[name], output, xs[name], layer[name], None, out, overlap=overlap)

            row[label] = microseconds(work, 1)
        row["torch"] = microseconds(
            lambda xs=xs: [F.linear(xs[name], layer[name]) for layer in layers for name in names] and None, 1
        )
        times = "  ".join(f"{k} {v:8.1f} us {num_bytes / v / 1e6:5.2f}" for k, v in row.items() if isinstance(v, float))
        print(f"chain {model:5} t={t:<3} {times} TB/s")
        results.append(row)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--alternatives", type=int, default=0, help="also time this many other layouts per shape")
    parser.add_argument("--skip-variants", action="store_true", help="check the chosen variants only")
    options = parser.parse_args()
    error = cuda_kernels_error()
    if error:
        raise SystemExit(f"the kernels can't run: {error}")
    gpu = linear.gpu_of(torch.cuda.current_device())
    print(torch.cuda.get_device_name(), gpu)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    results["wrong"] = 0 if options.skip_variants else check_variants(gpu)
    results["shapes"], results["chains"] = [], []
    for model in options.shapes:
        for name in SHAPES[model]:
            results["shapes"] += time_shape(model, name, options.tokens, gpu, options.alternatives)
            torch.cuda.empty_cache()
        results["chains"] += time_chain(model, [t for t in options.tokens if t in (1, 8, 16, 32, 64)], gpu)
        torch.cuda.empty_cache()
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
