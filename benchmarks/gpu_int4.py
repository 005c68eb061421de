"""Products with weights of 4 bits on a GPU for 1 to 64 rows: right, and how far from the speed of memory.

    python benchmarks/gpu_int4.py [--rows 1 2 4 8 16 32 64] [--out results.json]

The layers of a Llama-2-7B shape, group 128. Times are of CUDA graphs: those of one product go through copies that
exceed the L2 cache together, those of a step through 32 layers of different weights, in which kernels overlap as in a
model. Layouts are named by what makes them; the best of each product is printed as `Plan(...)`. Each section has a
process and a time limit of its own, and where it fails a second one, which goes on after the product that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_linear import make, microseconds
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.cuda import linear, wide
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.int4 import Int4Matrix, pack
from turbolm.ops.cuda.linear import Matrix
from turbolm.ops.cuda.plan import (
    INT4,
    X_BUFFERS,
    Output,
    Plan,
    Tile,
    Unit,
    estimate,
    needs_sm,
    plan_linear,
    tiles_of,
)
from turbolm.ops.cuda.weights import Int4Linear
from turbolm.quant.int4 import int4

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
LAYERS = 32
UNIT = INT4[128]
ROTATION = 150 << 20  # bytes of weights that a graph goes through at least: three times the L2 cache
MEMORY = 4.55e6  # bytes per microsecond of an H200
SECTIONS = {"compile": 60, "check": 40, "layouts": 50, "steps": 40}  # and their limits in seconds
CHECKS = ((torch.bfloat16, 128), (torch.bfloat16, 32), (torch.float16, 64), (torch.float16, 0))  # 0: a row
#: Beside those that the planner has.
MORE_TILES = tuple(
    Tile(*sizes, UNIT, True)
    for sizes in (
        *((8, 2, 4, 2, 6), (8, 1, 8, 2, 6), (8, 2, 4, 3, 3), (8, 1, 8, 3, 3), (8, 2, 4, 1, 8), (8, 1, 8, 1, 8)),
        *((8, 2, 8, 1, 4), (8, 2, 8, 2, 2), (8, 1, 16, 1, 4), (8, 4, 4, 1, 4)),
        *((16, 2, 8, 1, 3), (16, 4, 4, 1, 3), (16, 2, 4, 2, 3), (16, 1, 8, 1, 4)),
    )
)


def random_matrix(n: int, k: int, group: int) -> tuple[Int4Matrix, Tensor]:
    """Packed, and as float32."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, k // group, device="cuda") * 2 * k**-0.5 / 7).half()
    zeros = torch.randint(0, 17, (n, k // group), dtype=torch.uint8, device="cuda")
    return pack(codes, scales, zeros), int4(codes, scales, zeros).dequantize(torch.float32)


def any_matrix(n: int, k: int) -> Int4Matrix:
    """Of random codes and one scale, made quickly."""
    units = torch.randint(0, 256, (n // 16, k // 128, UNIT.num_bytes), dtype=torch.uint8, device="cuda")
    word = torch.tensor([k**-0.5 / 5], dtype=torch.float32).view(torch.int32) & ~31 | 8
    units[:, :, 1024:] = word.view(torch.uint8).repeat(16).cuda()
    return Int4Matrix(units, 128)


def output_of(name: str) -> Output:
    return Output.GATED if name == "gate_up" else Output.PARTS


def planned(t: int, n: int, k: int, output: Output, unit: Unit = UNIT) -> Plan:
    plan = plan_linear(t, n, k, output, linear.gpu_of(0), unit)
    assert plan is not None
    return plan


def plans_of(t: int, plan: Callable[..., Plan], *unit: Unit) -> dict[str, Plan]:
    return {name: plan(t, n, k, output_of(name), *unit) for name, (n, k) in SHAPES.items()}


def run_ring(
    plan: Plan, output: Output, x: Tensor, matrix: Matrix, out: dict[Any, Tensor], overlap: bool = True
) -> Tensor:
    t, n = x.shape[0], matrix.shape[0]
    if output is Output.PARTS and plan.splits == 1:
        output = Output.ELEMENTS
    shape = {Output.PARTS: (plan.splits, t, n), Output.GATED: (t, n // 2)}.get(output, (t, n))
    if shape not in out:
        out[shape] = torch.empty(shape, dtype=torch.float32 if output is Output.PARTS else x.dtype, device="cuda")
    linear.run(plan, output, x, matrix, None, out[shape], overlap=overlap)
    return out[shape]


def ring_layer(
    x: dict[str, Tensor], layer: Mapping[str, Matrix], plans: dict[str, Plan], overlap: float = math.inf
) -> None:
    """overlap: bytes of weights up to which a product starts beside the kernel before it."""
    for name, matrix in layer.items():
        run_ring(plans[name], output_of(name), x[name], matrix, {}, plans[name].num_bytes <= overlap)


def wide_layer(x: dict[str, Tensor], layer: Mapping[str, Int4Matrix]) -> None:
    for name, matrix in layer.items():
        run_wide(name, x[name], matrix)


def run_wide(name: str, x: Tensor, matrix: Int4Matrix) -> None:
    n = matrix.shape[0]
    if name == "gate_up":
        wide.wide_gated(x, matrix, "silu", x.new_empty(x.shape[0], n // 2))
    else:
        wide.wide_linear(x, matrix, None, x.new_empty(x.shape[0], n))


def centered(plan: Plan) -> Plan:
    """With zero points taken off codes."""
    return replace(plan, tile=replace(plan.tile, raw_codes=False))


def raw(plan: Plan) -> Plan:
    """With zero points taken off sums."""
    return replace(plan, tile=replace(plan.tile, raw_codes=True))


def describe(plan: Plan) -> str:
    """As source."""
    tile = plan.tile
    sizes = f"{tile.tokens}, {tile.warps_m}, {tile.warps_k}, {tile.tiles_m}, {tile.depth}"
    numbers = f"{plan.groups}, {plan.splits}, {plan.num_tiles}, {plan.num_units}"
    return f"Plan(Tile({sizes}, INT4[128], {tile.raw_codes}), {numbers}, {plan.resident}, alone={plan.alone})"


def candidates(t: int, n: int, k: int, output: Output) -> Iterator[Plan]:
    """Both variants of the chosen plan, then the best by estimate of every tile."""
    gpu, chosen = linear.gpu_of(0), planned(t, n, k, output)
    yield from (raw(chosen), centered(chosen))
    for tile in (*tiles_of(UNIT), *MORE_TILES):
        if tile.tokens != chosen.tile.tokens:
            continue
        plans = []
        for splits in range(1, 9 if output is Output.PARTS else 2):
            cta_tiles = -(-chosen.num_tiles // min(chosen.num_tiles, gpu.num_sms // splits))
            groups = -(-chosen.num_tiles // cta_tiles)
            for resident in (True, False):
                alone = needs_sm(groups * splits, gpu)
                plan = Plan(tile, groups, splits, chosen.num_tiles, chosen.num_units, resident, alone=alone)
                usable = resident or plan.cta_units > X_BUFFERS * tile.slice_units
                if usable and plan.shared_bytes <= gpu.shared_per_cta and plan != chosen:
                    plans.append(plan)
        plans.sort(key=lambda plan: estimate(plan, output, gpu))
        for plan in plans[: 2 if output is Output.PARTS else 1]:
            yield raw(plan)
            if tile.tokens > 16:
                yield centered(plan)


def compile_all(rows: Sequence[int]) -> None:
    """What will run, by many threads."""
    jobs: set[tuple[str, tuple[tuple[str, int], ...], str]] = set()
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())

    def add_ring(plan: Plan, output: Output, dtype: torch.dtype) -> None:
        if output is Output.PARTS and plan.splits == 1:
            output = Output.ELEMENTS
        jobs.add(("linear.cu", tuple(linear.kernel_defines(plan.tile, output, 0, dtype).items()), architecture))

    def add_wide(t: int, shape: tuple[int, int], unit: Unit, dtype: torch.dtype) -> None:
        tile = wide.plan_wide(t, *shape, unit, linear.gpu_of(0)).tile
        for output in (Output.GATED, Output.ELEMENTS):
            jobs.add(("wide.cu", tuple(wide.kernel_defines(tile, unit, output, 0, dtype).items()), "sm_90a"))

    for t, (name, shape) in itertools.product(rows, SHAPES.items()):
        add_wide(t, shape, UNIT, torch.bfloat16)
        for plan in candidates(t, *shape, output_of(name)):
            add_ring(plan, output_of(name), torch.bfloat16)
    for t, name, (dtype, group) in itertools.product(rows, ("gate_up", "down"), CHECKS):
        unit = INT4[group or 128]
        add_wide(t, SHAPES[name], unit, dtype)
        for output in (Output.GATED, Output.PARTS, Output.FLOATS):
            plan = planned(t, *SHAPES[name], output, unit)
            add_ring(plan, output, dtype)
            if output is Output.FLOATS:
                add_ring(raw(plan), output, dtype)
                add_ring(centered(plan), output, dtype)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda job: compile_cubin(KERNELS / job[0], dict(job[1]), job[2]), jobs))
    print(f"{len(jobs)} kernels")


def error_of(result: Tensor, expected: Tensor) -> float:
    """Largest, of the largest value."""
    if not bool(result.isfinite().all()):
        return math.inf
    return float((result.double() - expected).abs().max() / expected.abs().max())


def gate(y: Tensor) -> Tensor:
    half = y.shape[1] // 2
    return F.silu(y[:, :half]) * y[:, half:]


def check(rows: Sequence[int], found: dict[str, Any]) -> None:
    """Largest errors, of the largest value: of products as a model runs them, and of both variants in float32."""
    worst: dict[str, tuple[float, str]] = {}
    for name, (dtype, group) in itertools.product(("gate_up", "down"), CHECKS):
        n, k = SHAPES[name]
        matrix, dense = random_matrix(n, k, group or k)
        product, dense = Int4Linear(matrix, None, None), dense.double()
        for t in rows:
            x = make(t, k, dtype=dtype)
            y = F.linear(x.double(), dense)
            where = f"{name} t={t} group {group or k} {dtype}"
            plan, parts = planned(t, n, k, Output.FLOATS, matrix.unit), product.parts(x)
            results = {
                "gated": (product.gated(x, "silu"), gate(y)),
                "parts": (parts.double().sum(0) if parts.dim() == 3 else parts, y),
            }
            for label, variant in (("raw", raw(plan)), ("centered", centered(plan))):
                out = torch.empty(t, n, device="cuda")
                linear.run(variant, Output.FLOATS, x, matrix, None, out)
                results[label] = (out, y)
            for label, (result, expected) in results.items():
                error = error_of(result, expected)
                if error > (1e-4 if label in ("raw", "centered") else 1e-2):
                    print(f"WRONG {label} {error:.3g}: {where}", flush=True)
                worst[label] = max(worst.get(label, (0.0, "")), (error, where))
    for label, (error, where) in worst.items():
        print(f"largest error, {label}: {error:.2g} ({where})")
    found["errors"] = worst


def time_layouts(rows: Sequence[int], found: dict[str, Any], save: Callable[[], None]) -> None:
    """Layouts of each product: the chosen one (raw, then centered, which came before it), and the fastest."""
    for name, (n, k) in SHAPES.items():
        num_bytes = n * k * UNIT.num_bytes // (16 * UNIT.k)
        matrices = [any_matrix(n, k) for _ in range(max(2, -(-ROTATION // num_bytes)))]
        output = output_of(name)
        for t in rows:
            if f"{name} {t}" in found.setdefault("layouts", {}):
                continue
            found["layouts"][f"{name} {t}"] = None
            save()
            x, out = make(t, k), {}  # type: ignore[var-annotated]
            times: list[tuple[float, str]] = []
            for plan in candidates(t, n, k, output):
                try:
                    work = lambda p=plan: [run_ring(p, output, x, m, out) for m in matrices] and None  # noqa: B023, E731
                    times.append((microseconds(work, len(matrices)), describe(plan)))
                except EngineError as error:
                    print(f"   failed: {describe(plan)}: {error}")
            work = lambda: [run_wide(name, x, m) for m in matrices] and None  # noqa: B023, E731
            widely = microseconds(work, len(matrices))
            (chosen, _), (before, _), *_ = times
            best = sorted(times)[:3]
            print(
                f"{name} t={t}: floor {num_bytes / MEMORY:.1f}, centered {before:.2f}, raw {chosen:.2f}, "
                f"wide {widely:.2f}, best {best[0][0]:.2f} us"
            )
            print("\n".join(f"   {duration:.2f} {label}" for duration, label in best), flush=True)
            found["layouts"][f"{name} {t}"] = {"times": times, "wide": widely}


def time_steps(rows: Sequence[int], found: dict[str, Any]) -> None:
    """All layers' products in order. Milliseconds."""
    layers = [{name: any_matrix(*shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    num_bytes = sum(matrix.units.numel() for layer in layers for matrix in layer.values())
    print(f"a step of {LAYERS} layers: {num_bytes / 1e9:.2f} GB, at 4.55 TB/s {num_bytes / MEMORY / 1e3:.3f} ms")
    for t in rows:
        x = {name: make(t, k) for name, (_, k) in SHAPES.items()}
        chosen = plans_of(t, planned)
        kinds = {"centered": {name: centered(plan) for name, plan in chosen.items()}}
        kinds["raw"] = {name: raw(plan) for name, plan in chosen.items()}
        timed = {name: found.get("layouts", {}).get(f"{name} {t}") for name in SHAPES}
        if all(timed.values()):
            kinds["best"] = {}
            for name, (n, k) in SHAPES.items():
                by_label = {describe(plan): plan for plan in candidates(t, n, k, output_of(name))}
                kinds["best"][name] = by_label[min(timed[name]["times"])[1]]
        row = {}
        for label, plans in kinds.items():
            work = lambda p=plans: [ring_layer(x, layer, p) for layer in layers] and None  # noqa: B023, E731
            row[label] = microseconds(work, 1) / 1e3
        row["wide"] = microseconds(lambda: [wide_layer(x, layer) for layer in layers] and None, 1) / 1e3  # noqa: B023
        print(f"step t={t}: " + ", ".join(f"{label} {value:.3f}" for label, value in row.items()), "ms", flush=True)
        found.setdefault("steps", {})[t] = row


def run_section(section: str, limit: int) -> int | None:
    """The exit status; None: it took too long."""
    started, status = time.perf_counter(), None
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = subprocess.run([sys.executable, *sys.argv, "--section", section], timeout=limit).returncode
    print(f"{section}: {time.perf_counter() - started:.0f} s, status {status}", flush=True)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("int4.json"), help="a JSON file for the results")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--section", choices=SECTIONS, help="this one alone, without a limit")
    options = parser.parse_args()
    if options.section is None:
        options.out.unlink(missing_ok=True)
        for section, limit in SECTIONS.items():
            if run_section(section, limit) != 0 and section == "layouts":
                run_section(section, limit)
        return
    error = cuda_kernels_error()
    if error:
        raise SystemExit(f"the kernels can't run: {error}")
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    save = lambda: options.out.write_text(json.dumps(found, indent=1)) and None  # noqa: E731
    sections = {
        "compile": lambda: compile_all(options.rows),
        "check": lambda: check(options.rows, found),
        "layouts": lambda: time_layouts(options.rows, found, save),
        "steps": lambda: time_steps(options.rows, found),
    }
    try:
        sections[options.section]()
    finally:
        save()


if __name__ == "__main__":
    main()
