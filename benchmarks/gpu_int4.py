"""Products with weights of 4 bits on a GPU: right, and how far from the speed of memory and of the tensor cores.

    python benchmarks/gpu_int4.py --out results.json [--rows 1 16 64 256] [--variants 1 64]

The layers of a Llama-2-7B shape, group 128. Times are of CUDA graphs; those of a step go through 32 layers of
different weights, those of one product through copies that exceed the L2 cache together. A kernel runs "alone" (each
CTA has an SM), "shared" (two fit an SM) or "apart" (it starts when the one before has ended).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_linear import make, microseconds
from torch import Tensor

from turbolm.ops.cuda import linear, weights, wide
from turbolm.ops.cuda.compiler import KERNELS, compile_cubin, cuda_kernels_error
from turbolm.ops.cuda.eight_bit import EightBitMatrix
from turbolm.ops.cuda.int4 import Int4Matrix, pack
from turbolm.ops.cuda.linear import Matrix
from turbolm.ops.cuda.plan import DENSE, INT4, INT8, Output, Plan, Tile, Unit, estimate, plan_linear, tiles_of
from turbolm.ops.cuda.weights import DenseLinear, EightBitLinear, Int4Linear
from turbolm.ops.cuda.wide import WidePlan, WideTile
from turbolm.quant.int4 import int4

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
HEAD = (32000, 4096)
LAYERS = 32
UNIT = INT4[128]
ROTATION = 300 << 20  # bytes of weights that a graph goes through at least
WIDE_TILES = (
    *(WideTile(16, warpgroups, 6) for warpgroups in (2, 4)),
    *(WideTile(32, warpgroups, 6) for warpgroups in (2, 4)),
    *(WideTile(64, warpgroups, 6) for warpgroups in (2, 4)),
    *(WideTile(64, 4, 4, fragments) for fragments in (2, 4)),
    *(WideTile(128, warpgroups, 4, fragments) for warpgroups in (2, 4) for fragments in (2, 4)),
    WideTile(256, 2, 3),
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


def error_of(result: Tensor, expected: Tensor) -> float:
    """Largest, of the largest value."""
    if not bool(result.isfinite().all()):
        return float("inf")
    return float((result.float() - expected).abs().max() / expected.abs().max())


def gate(y: Tensor) -> Tensor:
    half = y.shape[1] // 2
    return F.silu(y[:, :half]) * y[:, half:]


def check_paths(rows: list[int]) -> list[dict[str, Any]]:
    """Every shape, group size and number of rows, as a model runs them; the largest error of each kind."""
    found = []
    for (name, (n, k)), group in itertools.product(SHAPES.items(), (128, 32, 64, 0)):
        matrix, dense = random_matrix(n, k, group or k)
        bias = make(n)
        product = Int4Linear(matrix, bias, None)
        plain = Int4Linear(matrix, None, None)
        for t in rows:
            x = make(t, k, dtype=dtype_of(t))
            product.bias = bias.to(x.dtype)
            y = F.linear(x.float(), dense)
            errors = {}
            if product.is_deferred(t):
                parts = product.parts(x)
                errors["parts"] = error_of(parts.sum(0) if parts.dim() == 3 else parts, y + bias)
                errors["gated"] = error_of(plain.gated(x, "silu"), gate(y))
            logits = torch.empty(t, n, device="cuda")
            plain.logits(x, logits)
            errors["logits"] = error_of(logits, y)
            if t >= 128:
                errors["unpacked"] = error_of(product.multiply(x), y + bias)
            for kind, error in errors.items():
                found.append({"layer": name, "group": group or k, "t": t, "kind": kind, "error": error})
                if error > 1e-2:
                    print(f"WRONG {error:.3g} {found[-1]}")
        del matrix, dense
    worst = max(found, key=lambda row: row["error"])
    print(
        f"checked {len(found)} products, {sum(r['error'] > 1e-2 for r in found)} wrong; the worst: {worst}", flush=True
    )
    order = torch.randperm(4096, device="cuda").int()
    matrix, dense = random_matrix(4096, 4096, 128)
    x = make(8, 4096)
    error = error_of(Int4Linear(matrix, None, order).logits(x, out := torch.empty(8, 4096, device="cuda")) or out,
                     F.linear(x[:, order.long()].float(), dense))  # fmt: skip
    print(f"columns in an order: {error:.2g}")
    return found


def planned(t: int, n: int, k: int, output: Output, unit: Unit = UNIT) -> Plan:
    plan = plan_linear(t, n, k, output, linear.gpu_of(0), unit)
    assert plan is not None
    return plan


def ring_plans(t: int, n: int, k: int, output: Output, unit: Unit) -> Iterator[Plan]:
    """The chosen one, then the best by estimate of every tile and number of CTAs."""
    gpu = linear.gpu_of(0)
    chosen = planned(t, n, k, output, unit)
    yield chosen
    for tile in (tile for tile in tiles_of(unit) if tile.tokens == chosen.tile.tokens):
        plans = []
        for splits in range(1, 9 if output is Output.PARTS else 2):
            cta_tiles = -(-chosen.num_tiles // min(chosen.num_tiles, gpu.num_sms // splits))
            groups = -(-chosen.num_tiles // cta_tiles)
            for resident in (True, False):
                plan = Plan(tile, groups, splits, chosen.num_tiles, chosen.num_units, resident)
                usable = resident or plan.cta_units > 3 * tile.slice_units
                if usable and plan.shared_bytes <= gpu.shared_per_cta and plan != replace(chosen, alone=False):
                    plans.append(plan)
        plans.sort(key=lambda plan: estimate(plan, output, gpu))
        yield from plans[: 3 if output is Output.PARTS else 1]


def wide_plans(t: int, n: int, k: int) -> Iterator[WidePlan]:
    gpu = linear.gpu_of(0)
    yield wide.plan_wide(t, n, k, UNIT, gpu)
    for tile in WIDE_TILES:
        fits = tile.tokens // 4 < t and (tile.tokens >= min(t, 64)) and tile.shared_bytes(UNIT) <= gpu.shared_per_cta
        if not fits:
            continue
        row_tiles, token_tiles = -(-n // (64 * tile.warpgroups)), -(-t // tile.tokens)
        tiles = row_tiles * token_tiles
        for grid in sorted({gpu.num_sms, min(tiles, gpu.num_sms), gpu.num_sms // tiles * tiles or gpu.num_sms}):
            yield WidePlan(tile, grid, row_tiles, token_tiles, k // 128)


def run_ring(plan: Plan, output: Output, x: Tensor, matrix: Matrix, out: dict[Any, Tensor], overlap: bool) -> None:
    t, n = x.shape[0], matrix.shape[0]
    if output is Output.PARTS and plan.splits == 1:
        output = Output.ELEMENTS
    shape = {Output.PARTS: (plan.splits, t, n), Output.GATED: (t, n // 2)}.get(output, (t, n))
    if shape not in out:
        out[shape] = torch.empty(shape, dtype=torch.float32 if output is Output.PARTS else x.dtype, device="cuda")
    linear.run(plan, output, x, matrix, None, out[shape], overlap=overlap)


def time_variants(name: str, t: int, matrices: Sequence[Matrix], unit: Unit) -> dict[str, Any]:
    """Every variant of the kernels on one shape."""
    n, k = SHAPES[name]
    output = Output.GATED if name == "gate_up" else Output.PARTS
    x, out = make(t, k), {}
    result = torch.empty(t, n // 2 if output is Output.GATED else n, dtype=x.dtype, device="cuda")
    kind = Output.GATED if output is Output.GATED else Output.ELEMENTS
    times, chosen = [], set()

    def measure(label: str, work: Callable[[Any], Any]) -> None:
        times.append((microseconds(lambda: [work(m) for m in matrices] and None, len(matrices)), label))

    if t <= 64:
        for i, ring in enumerate(ring_plans(t, n, k, output, unit)):
            for mode in ("alone", "shared", "apart"):
                plan = replace(ring, alone=mode == "alone")
                if mode == "alone" or plan.shares_sm(linear.gpu_of(0)):
                    label = f"{describe_ring(plan)} {mode}"
                    measure(label, lambda m, p=plan, o=mode != "apart": run_ring(p, output, x, m, out, overlap=o))
                    chosen |= {label} if i == 0 else set()
    if unit.groups:
        for i, plan in enumerate(wide_plans(t, n, k)):
            measure(describe_wide(plan), lambda m, p=plan: wide.run(p, kind, x, m, None, result))
            chosen |= {describe_wide(plan)} if i == 0 else set()
    num_bytes, flops = n * k * unit.num_bytes // (16 * unit.k), 2 * t * n * k
    weights_of = {INT8: "int8 ", DENSE: "bf16 "}.get(unit, "")
    print(f"{weights_of}{name} t={t}: floor {max(num_bytes / 4.55e6, flops / 689e6):.1f} us")
    for i, (duration, label) in enumerate(sorted(times)):
        if i < 6 or label in chosen:
            rates = f"{num_bytes / duration / 1e6:5.2f} TB/s {flops / duration / 1e6:4.0f} TFLOP/s"
            print(f"   {duration:7.2f} us {rates} {label}{'  <- chosen' if label in chosen else ''}")
    print(end="", flush=True)
    return {"layer": name, "t": t, "unit": unit.num_bytes, "times": sorted(times)}


def time_shapes(rows: list[int]) -> list[dict[str, Any]]:
    found = []
    for name, (n, k) in SHAPES.items():
        for unit, make_matrix in (
            (UNIT, any_matrix),
            (INT8, lambda n, k: eight_bit_linear(n, k, torch.int8).matrix),
            (DENSE, lambda n, k: make(n, k, scale=0.02)),
        ):
            num_bytes = n * k * unit.num_bytes // (16 * unit.k)
            matrices = [make_matrix(n, k) for _ in range(max(2, -(-ROTATION // num_bytes)))]
            found += [time_variants(name, t, matrices, unit) for t in (rows if unit is UNIT else (1, 8))]
    return found


def describe_ring(plan: Plan) -> str:
    tile = plan.tile
    return (
        f"ring {tile.warps_m}x{tile.warps_k}w m{tile.tiles_m} d{tile.depth} grid {plan.groups}x{plan.splits}"
        f"{' res' if plan.resident else ''} {plan.shared_bytes >> 10}K pf{plan.prefetch_bytes >> 10}K"
    )


def describe_wide(plan: WidePlan) -> str:
    tile = plan.tile
    return f"wide {tile.tokens}x{64 * tile.warpgroups} s{tile.stages} f{tile.fragments} grid {plan.grid}"


def compile_all(rows: list[int]) -> None:
    """What is timed, and what products of so many rows use, by many threads."""
    jobs: set[tuple[str, tuple[tuple[str, int], ...], str]] = set()
    ring_outputs = (Output.PARTS, Output.ELEMENTS, Output.GATED)

    def add(tile: Tile | WideTile, unit: Unit, output: Output, dtype: torch.dtype) -> None:
        if isinstance(tile, WideTile):
            jobs.add(("wide.cu", tuple(wide.kernel_defines(tile, unit, output, 0, dtype).items()), "sm_90a"))
        else:
            architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
            jobs.add(("linear.cu", tuple(linear.kernel_defines(tile, output, 0, dtype).items()), architecture))

    for unit, output in itertools.product((UNIT, INT8, DENSE), ring_outputs):
        for tile in tiles_of(unit):
            if unit is UNIT or tile.tokens <= 16:
                add(tile, unit, output, torch.bfloat16)
    for wide_tile, output in itertools.product({*WIDE_TILES, *wide.TILES}, (Output.ELEMENTS, Output.GATED)):
        add(wide_tile, UNIT, output, torch.bfloat16)
    for (n, k), unit, t in itertools.product(SHAPES.values(), INT4.values(), rows):
        for output in (*ring_outputs, Output.FLOATS):
            if t <= 16:
                plan = planned(t, n, k, Output.PARTS if output is Output.ELEMENTS else output, unit)
                add(plan.tile, unit, output, dtype_of(t))
            if output is not Output.PARTS:
                add(wide.plan_wide(t, n, k, unit, linear.gpu_of(0)).tile, unit, output, dtype_of(t))
    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda job: compile_cubin(KERNELS / job[0], dict(job[1]), job[2]), jobs))
    print(f"compiled {len(jobs)} kernels in {time.perf_counter() - started:.0f} s", flush=True)


def dtype_of(t: int) -> torch.dtype:
    """In which products of so many rows are checked."""
    return torch.float16 if t in (2, 32) else torch.bfloat16


def ring_layer(
    x: dict[str, Tensor], layer: dict[str, Matrix], plans: dict[str, Plan], overlap: float = math.inf
) -> None:
    """overlap: bytes of weights up to which a product starts beside the kernel before it."""
    for name, matrix in layer.items():
        output = Output.GATED if name == "gate_up" else Output.PARTS
        plan = plans[name]
        run_ring(plan, output, x[name], matrix, {}, plan.num_bytes <= overlap)


def plans_of(t: int, plan: Callable[..., Plan], *unit: Unit) -> dict[str, Plan]:
    return {
        name: plan(t, n, k, Output.GATED if name == "gate_up" else Output.PARTS, *unit)
        for name, (n, k) in SHAPES.items()
    }


def matrices_of(layer: dict[str, Int4Linear]) -> dict[str, Matrix]:
    return {name: product.matrix for name, product in layer.items()}


def wide_layer(x: dict[str, Tensor], layer: dict[str, Int4Linear]) -> None:
    for name, product in layer.items():
        out = x[name].new_empty(x[name].shape[0], SHAPES[name][0] // (2 if name == "gate_up" else 1))
        if name == "gate_up":
            wide.wide_gated(x[name], product.matrix, "silu", out)
        else:
            wide.wide_linear(x[name], product.matrix, None, out)


def model_layer(x: dict[str, Tensor], layer: dict[str, Int4Linear]) -> None:
    """By the kernels that a model's step chooses."""
    for name, product in layer.items():
        if name == "gate_up":
            product.gated(x[name], "silu")
        else:
            product.parts(x[name])


def unpack_layer(x: dict[str, Tensor], layer: dict[str, Int4Linear], num_bytes: int) -> None:
    weights._UNPACKED_BYTES = num_bytes
    for name, product in layer.items():
        product.multiply(x[name])


def time_steps(rows: list[int]) -> list[dict[str, Any]]:
    """All layers' products in order, with each kernel; the head apart. Milliseconds."""
    layers = [
        {name: Int4Linear(any_matrix(*shape), None, None) for name, shape in SHAPES.items()} for _ in range(LAYERS)
    ]
    head = [DenseLinear(make(*HEAD, scale=0.02), None) for _ in range(2)]
    dense = [{name: make(*shape, scale=0.02) for name, shape in SHAPES.items()} for _ in range(4)]
    num_bytes = sum(product.num_bytes for layer in layers for product in layer.values())
    print(f"a step of {LAYERS} layers: {num_bytes / 1e9:.2f} GB, at 4.55 TB/s {num_bytes / 4.55e9:.3f} ms", flush=True)
    return [time_step(t, layers, head, dense, num_bytes) for t in rows]


def time_step(
    t: int,
    layers: list[dict[str, Int4Linear]],
    head: list[DenseLinear],
    dense: list[dict[str, Tensor]],
    num_bytes: int,
) -> dict[str, Any]:
    x = {name: make(t, k) for name, (_, k) in SHAPES.items()}
    layers = layers if t <= 512 else layers[:8]
    row: dict[str, Any] = {"t": t}

    def measure(label: str, work: Callable[[dict[str, Int4Linear]], None]) -> None:
        row[label] = microseconds(lambda: [work(layer) for layer in layers] and None, len(layers)) * LAYERS / 1e3

    if t <= 32:
        chosen = plans_of(t, planned)
        for label, plans, overlap in (
            ("ring", chosen, math.inf),
            ("ring shared", {name: replace(plan, alone=False) for name, plan in chosen.items()}, math.inf),
            ("ring apart", chosen, 0),
        ):
            work = lambda layer, p=plans, o=overlap: ring_layer(x, matrices_of(layer), p, o)  # noqa: E731
            measure(label, work)
    measure("wide", lambda layer: wide_layer(x, layer))
    if layers[0]["qkv"].is_deferred(t):
        measure("as a model", lambda layer: model_layer(x, layer))
    if t >= 512:
        for megabytes in (64, 256):
            measure(f"unpack {megabytes}M", lambda layer, b=megabytes << 20: unpack_layer(x, layer, b))
    best = min(value for label, value in row.items() if label != "t")
    products = lambda: [F.linear(x[name], w) for layer in dense for name, w in layer.items()] and None  # noqa: E731
    row["bf16"] = microseconds(products, len(dense)) * LAYERS / 1e3
    if t <= 16:
        chosen = plans_of(t, planned, DENSE)
        shared = {name: replace(plan, alone=False) for name, plan in chosen.items()}
        limits = (("", chosen, math.inf), (" shared, small overlap", shared, 64 << 20), (" apart", chosen, 0))
        for label, plans, overlap in limits:
            products = lambda p=plans, o=overlap: [ring_layer(x, layer, p, o) for layer in dense] and None  # noqa: E731
            row[f"bf16 ring{label}"] = microseconds(products, len(dense)) * LAYERS / 1e3
    logits, hidden = torch.empty(t, HEAD[0], device="cuda"), make(t, HEAD[1])
    row["head"] = microseconds(lambda: [h.logits(hidden, logits) for h in head] and None, len(head)) / 1e3
    floor = max(num_bytes / 4.55e9, 2 * sum(n * k for n, k in SHAPES.values()) * LAYERS * t / 689e9)
    times = "  ".join(f"{label} {value:.3f}" for label, value in row.items() if label != "t")
    print(f"step t={t}: floor {floor:.3f}, best + head {best + row['head']:.3f} ms | {times}", flush=True)
    return row


def eight_bit_linear(n: int, k: int, dtype: torch.dtype) -> EightBitLinear:
    if dtype == torch.int8:
        codes = torch.randint(-127, 128, (n, k), dtype=dtype, device="cuda")
    else:
        codes = make(n, k, scale=60, dtype=torch.float32).clamp_(-448, 448).to(dtype)
    return EightBitLinear(EightBitMatrix(codes, (torch.rand(n, device="cuda") + 0.5) / 60 * k**-0.5), None)


def time_eight_bits(rows: list[int]) -> list[dict[str, Any]]:
    """int8 and fp8, whose activations are rounded, too, beyond few rows."""
    found = []
    for dtype in (torch.int8, torch.float8_e4m3fn):
        layers = [{name: eight_bit_linear(*shape, dtype) for name, shape in SHAPES.items()} for _ in range(4)]
        for t in rows:
            found.append(time_eight_bit_step(layers, t) | {"dtype": str(dtype)})
            print(found[-1], flush=True)
    return found


def time_eight_bit_step(layers: list[dict[str, EightBitLinear]], t: int) -> dict[str, Any]:
    """The largest errors, and the milliseconds that a step's layers take."""
    x = {name: make(t, k) for name, (_, k) in SHAPES.items()}
    row: dict[str, Any] = {"t": t}

    def product(name: str, linear_8: EightBitLinear) -> Tensor:
        if not linear_8.is_deferred(t):
            return linear_8.multiply(x[name])
        return linear_8.gated(x[name], "silu") if name == "gate_up" else linear_8.parts(x[name])

    for name, linear_8 in layers[0].items():
        y = F.linear(x[name].float(), linear_8.matrix.codes.float() * linear_8.matrix.scales[:, None])
        result = product(name, linear_8)
        expected = y if result.shape[-1] == y.shape[1] else gate(y)
        row[f"error {name}"] = error_of(result.sum(0) if result.dim() == 3 else result, expected)
    work = lambda: [product(*item) for layer in layers for item in layer.items()] and None  # noqa: E731
    row["ms"] = microseconds(work, len(layers)) * LAYERS / 1e3
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the results")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 768, 1024, 2048]
    )
    parser.add_argument(
        "--variants", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 256], help="rows to try all of"
    )
    options = parser.parse_args()
    error = cuda_kernels_error()
    if error:
        raise SystemExit(f"the kernels can't run: {error}")
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    checked = [1, 2, 8, 16, 17, 32, 64, 128, 200, 256, 1024, 4096]
    compile_all(checked)
    sections: dict[str, Callable[[], Any]] = {
        "checks": lambda: check_paths(checked),
        "steps": lambda: time_steps(options.rows),
        "eight bits": lambda: time_eight_bits([1, 4, 8, 16, 17, 64, 256, 2048]),
        "variants": lambda: time_shapes(options.variants),
    }
    for name, section in sections.items():
        started = time.perf_counter()
        results[name] = section()
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
