"""Linear layers over 17 to 256 rows on a GPU: right, and how far from cuBLAS and the speed of memory.

    python benchmarks/gpu_linear_wide.py --json results.json [--tokens 32 64] [--shapes 8B] [--seconds 100]

Times are of CUDA graphs over copies of the weights that exceed the L2 cache together: `ours` with kernels
that overlap (programmatic dependent launch), `apart` without. Below a layer, its fastest alternatives.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_linear import ACTIVATIONS, LAYERS, ROTATION, SHAPES, allocate, make, microseconds
from torch import Tensor
from triton.runtime.errors import OutOfResources

from turbolm.ops.triton import linear
from turbolm.ops.triton.linear import MAX_SPLITS, Output, Plan, estimate, layout, plan_wide

TOKENS = (17, 24, 32, 48, 64, 96, 128, 192, 256)
VARIED = (32, 64, 128)  # tokens at which alternatives and chains are timed
RAGGED = (  # t, n, k: edges within tiles, and within blocks of k
    *((17, 1000, 520), (50, 4096 + 48, 1032), (100, 34000, 264), (64, 3 * 112 * 2, 4096)),
    *((200, 1000, 1536), (1, 96, 8)),
)


def product(plan: Plan, output: Output, x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    output, out = allocate(output, plan.splits, x.shape[0], w.shape[0], x.dtype)
    linear.run(plan, output, x, w, bias, out, activation)
    return out.sum(0) if output is Output.PARTS else out.float()


def error_of(
    plan: Plan, output: Output, x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str = "silu"
) -> float:
    """Largest error, of the largest value."""
    expected = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    if output is Output.GATED:
        features = w.shape[0] // 2
        expected = ACTIVATIONS[activation](expected[:, :features]) * expected[:, features:]
    result = product(plan, output, x, w, bias, activation)
    error = float((result - expected).abs().max() / expected.abs().max())
    return error if result.isfinite().all() else float("inf")


def check_edges(num_sms: int) -> int:
    """Shapes with ragged edges, every output, both dtypes and every activation. → how many were wrong"""
    wrong = 0
    cases = [(shape, output) for shape in RAGGED for output in Output]
    for i, ((t, n, k), output) in enumerate(cases):
        dtype, activation = (torch.bfloat16, torch.float16)[i % 2], list(ACTIVATIONS)[i % 3]
        plan = plan_wide(t, n, k, output, num_sms)
        assert plan is not None
        x, w = make(t, k, dtype=dtype), make(n, k, scale=k**-0.5, dtype=dtype)
        bias = make(n, dtype=dtype) if output in (Output.PARTS, Output.ELEMENTS) else None
        error = error_of(plan, output, x, w, bias, activation)
        if error > 1e-2:
            wrong += 1
            print("WRONG", f"{error:.3g}", (t, n, k), output.name, dtype, activation, plan)
    print(f"checked {len(cases)} edges, {wrong} wrong", flush=True)
    return wrong


def alternatives(plan: Plan, output: Output, n: int, k: int, num_sms: int) -> list[Plan]:
    """Other tiles and splits, best by estimate first; and the plan with one knob turned."""
    halves = 2 if output is Output.GATED else 1
    features = n // halves
    found: dict[tuple[int, int], Plan] = {}
    for rows in range(32, 256 // halves + 1, 16):
        if rows * halves * plan.block_tokens > 1 << 15 or (features % rows and rows not in (64, 128, 256)):
            continue
        for splits in range(1, min(MAX_SPLITS, k // 256) + 1 if output is Output.PARTS else 2):
            found[rows, splits] = layout(plan.block_tokens, features, rows, splits, halves, num_sms)
    layouts = sorted(found.values(), key=lambda other: estimate(other, output, k, num_sms))
    halved = replace(plan, stages=max(2, (plan.stages - 1) // 2))
    knobs = [
        replace(plan, stages=plan.stages - 1),
        halved,
        replace(plan, block_k=2 * plan.block_k, stages=max(2, plan.stages // 2)),
        replace(plan, num_warps=4),
        replace(plan, trigger=0),
        replace(plan, trigger=1 << 20),
        replace(plan, prefetch=256),
    ]
    if plan.persistent:
        knobs += [replace(plan, programs=plan.tiles), replace(halved, programs=2 * num_sms)]
    # Two programs per multiprocessor: of half the height, each with half the ring.
    rows = plan.block_rows // 2
    if rows >= 64 and plan.block_tokens <= 64:
        two = layout(plan.block_tokens, features, rows, plan.splits, halves, 2 * num_sms)
        knobs.append(replace(two, stages=min(two.stages // 2, 4), num_warps=4))
    return [other for other in layouts if other != plan][:5] + knobs


def registers(plan: Plan, output: Output) -> float:
    """Of each thread, for accumulators."""
    return (2 if output is Output.GATED else 1) * plan.block_rows * plan.block_tokens / (32 * plan.num_warps)


def compile_all(work: Iterable[tuple[Plan, Output, Tensor, Tensor, bool]]) -> None:
    """Every variant once, several at a time. One that doesn't fit the GPU fails when it is timed."""
    jobs = {}
    for plan, output, x, w, overlap in work:
        variant = (replace(plan, rows=plan.rows if plan.flat else 16, splits=1, tiles=2, programs=1), plan.persistent)
        jobs.setdefault((variant, output if plan.splits > 1 else -output, overlap), (plan, output, x, w, overlap))

    def launch(job: tuple[Plan, Output, Tensor, Tensor, bool]) -> None:
        plan, output, x, w, overlap = job
        output, out = allocate(output, plan.splits, x.shape[0], w.shape[0], x.dtype)
        with contextlib.suppress(OutOfResources):
            linear.run(plan, output, x, w, None, out, overlap=overlap)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(launch, jobs.values()))
    torch.cuda.synchronize()


def time_plan(plan: Plan, output: Output, x: Tensor, weights: list[Tensor], *, overlap: bool = True) -> float:
    output, out = allocate(output, plan.splits, x.shape[0], weights[0].shape[0], x.dtype)

    def work() -> None:
        for w in weights:
            linear.run(plan, output, x, w, None, out, overlap=overlap)

    try:
        return microseconds(work, len(weights))
    except OutOfResources:
        return float("inf")


def describe(plan: Plan) -> str:
    return (
        f"{plan.rows}/{plan.block_rows} x {plan.block_tokens} k{plan.block_k} s{plan.stages} w{plan.num_warps} "
        f"grid {plan.programs}x{plan.splits}{' of ' + str(plan.tiles) if plan.persistent else ''} "
        f"trigger {plan.trigger} pf {plan.prefetch}"
    )


def time_shape(
    model: str, name: str, tokens: list[int], num_sms: int, varied: Iterable[int], deadline: float
) -> list[dict[str, Any]]:
    n, k, output = SHAPES[model][name]
    num_bytes = n * k * 2
    weights = [make(n, k, scale=k**-0.5) for _ in range(max(2, -(-ROTATION // num_bytes)))]
    xs, plans, others = {t: make(t, k) for t in tokens}, {}, {}
    for t in tokens:
        plan = plan_wide(t, n, k, output, num_sms)
        assert plan is not None
        plans[t] = plan
        some = alternatives(plan, output, n, k, num_sms) if t in varied and time.monotonic() < deadline else []
        others[t] = [other for other in some if registers(other, output) <= 128]
    compile_all((plans[t], output, xs[t], weights[0], overlap) for t in tokens for overlap in (True, False))
    compile_all((plan, output, xs[t], weights[0], True) for t in tokens for plan in others[t])
    results = []
    for t in tokens:
        plan, x = plans[t], xs[t]
        error = error_of(plan, output, x, weights[0])
        ours, apart = (time_plan(plan, output, x, weights, overlap=overlap) for overlap in (True, False))
        theirs = microseconds(lambda x=x: [F.linear(x, w) for w in weights] and None, len(weights))
        result = {"model": model, "layer": name, "t": t, "error": error, "us": ours, "us_apart": apart}
        result |= {"us_torch": theirs, "estimate": estimate(plan, output, k, num_sms), "plan": describe(plan)}
        print(
            f"{model:5}{name:8} t={t:<3} {'WRONG' if error > 1e-2 else f'{error:.0e}'} {ours:7.2f} us "
            f"{num_bytes / ours / 1e6:5.2f} TB/s | apart {apart:7.2f} | torch {theirs:7.2f} x{theirs / ours:.2f} | "
            f"{describe(plan)}",
            flush=True,
        )
        tried = sorted((time_plan(other, output, x, weights), describe(other)) for other in others[t])
        result["alternatives"] = tried
        for microsecs, text in tried[:4]:
            print(f"{'':24} {microsecs:7.2f} us  {text}")
        results.append(result)
    return results


def time_chain(model: str, tokens: list[int], num_sms: int) -> list[dict[str, Any]]:
    """All layers' matrices in order, without the kernels between them. `tN`: the next kernel may start when a
    program has N steps left; `pf`: the first weights come into L2 before a kernel waits."""
    names = ("qkv", "o", "gate_up", "down")
    layers = [{name: make(*SHAPES[model][name][:2], scale=0.02) for name in names} for _ in range(LAYERS[model])]
    num_bytes = sum(w.numel() * 2 for layer in layers for w in layer.values())
    settings = {"apart": (0, 0, False), "t0": (0, 0, True), "t4": (4, 0, True), "all": (1 << 20, 0, True)}
    settings["t4 pf256"] = (4, 256, True)
    results = []
    for t in tokens:
        xs = {name: make(t, SHAPES[model][name][1]) for name in names}
        row: dict[str, Any] = {"model": model, "chain": LAYERS[model], "t": t}
        for label, (trigger, prefetch, overlap) in settings.items():
            plans, outs = {}, {}
            for name in names:
                n, k, output = SHAPES[model][name]
                plan = plan_wide(t, n, k, output, num_sms)
                assert plan is not None
                plans[name] = replace(plan, trigger=trigger, prefetch=prefetch)
                outs[name] = allocate(output, plan.splits, t, n, torch.bfloat16)
            compile_all((plans[name], SHAPES[model][name][2], xs[name], layers[0][name], overlap) for name in names)

            def work(plans=plans, outs=outs, overlap=overlap, xs=xs) -> None:
                for layer in layers:
                    for name in names:
                        output, out = outs[name]
                        linear.run(plans[name], output, xs[name], layer[name], None, out, overlap=overlap)

            row[label] = microseconds(work, 1)
        row["torch"] = microseconds(
            lambda xs=xs: [F.linear(xs[name], layer[name]) for layer in layers for name in names] and None, 1
        )
        times = "  ".join(f"{k} {v:.0f} us {num_bytes / v / 1e6:.2f}" for k, v in row.items() if isinstance(v, float))
        print(f"chain {model:5} t={t:<3} {times} TB/s", flush=True)
        results.append(row)
    return results


def launch_microseconds(num_sms: int) -> float:
    """What a launch takes the host."""
    x, w = make(32, 1024), make(4096, 1024)
    plan = plan_wide(32, 4096, 1024, Output.FLOATS, num_sms)
    assert plan is not None
    out = torch.empty(32, 4096, device="cuda")
    times = []
    for _ in range(200):
        start = time.perf_counter()
        linear.run(plan, Output.FLOATS, x, w, None, out)
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return sorted(times)[100] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="a file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--vary", type=int, nargs="*", default=list(VARIED), help="tokens to time alternatives at")
    parser.add_argument("--seconds", type=float, default=100, help="after which no alternatives are timed any more")
    options = parser.parse_args()
    if torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("the kernel runs on GPUs of compute capability 9 only")
    deadline = time.monotonic() + options.seconds * 0.7
    torch.manual_seed(0)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "wrong": check_edges(num_sms)}
    results["us_launch"] = launch_microseconds(num_sms)
    print(f"a launch takes the host {results['us_launch']:.0f} us")
    results["shapes"], results["chains"] = [], []
    for model in options.shapes:
        varied = options.vary if model == "8B" else ()
        for name in SHAPES[model]:
            results["shapes"] += time_shape(model, name, options.tokens, num_sms, varied, deadline)
            torch.cuda.empty_cache()
        results["chains"] += time_chain(model, [t for t in options.tokens if t in VARIED], num_sms)
        torch.cuda.empty_cache()
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
