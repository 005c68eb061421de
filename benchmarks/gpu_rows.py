"""The row and sampling kernels on one GPU: each checked against plain torch, and timed beside its floor.

    python benchmarks/gpu_rows.py [--only rotary sample] [--sweep] [--seconds 60] [--json FILE]

Times are of one call among many in a CUDA graph, data hot in the L2 cache where it fits, as within a model's
step. The floor is the bytes that a call must move at the rate given by --bandwidth. --sweep times the
kernels' knobs as well. Ends with exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops import sampling as sampling_reference
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.triton import rows, sampling

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
STEPS = (1, 8, 64, 256, 8192)  # tokens
SWEPT = (1, 64, 256, 8192)
PARTS = (1, 2, 4, 8)  # of small steps; 0 below: finished
BLOCK_SIZE = 16
CALLS = 20  # per graph


@dataclass(frozen=True)
class Case:
    """One kernel at one size. `check` runs it once and returns its largest error, in units of what is allowed."""

    kernel: str
    size: str
    call: Callable[[], object]
    num_bytes: int
    check: Callable[[], float] | None = None


def steps() -> Iterator[tuple[int, int]]:
    """(tokens, parts)"""
    for num_tokens in STEPS:
        yield num_tokens, 0
        if num_tokens <= 64:
            yield from ((num_tokens, p) for p in PARTS)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE)


def product(num_tokens: int, num_parts: int, width: int) -> tuple[Tensor, Tensor]:
    """What a matrix product hands on, and its value in float32."""
    if num_parts == 0:
        finished = torch.randn(num_tokens, width, device=DEVICE).to(DTYPE)
        return finished, finished.float()
    parts = torch.randn(num_parts, num_tokens, width, device=DEVICE)
    return parts, parts.sum(0)


def size_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def error(actual: Tensor, expected: Tensor) -> float:
    """1: as much as rounding to bfloat16 explains."""
    return float(((actual.float() - expected).abs() / (expected.abs() * 2**-8 + 1e-4)).max())


def norm_cases(sweep: bool) -> Iterator[Case]:
    reference = ReferenceOps(DEVICE, torch.float32)
    for width in (4096, 1024):
        weight = torch.randn(width, device=DEVICE).to(DTYPE)
        for num_tokens, num_parts in steps():
            x, value = product(num_tokens, num_parts, width)
            residual, out = torch.randn(num_tokens, width, device=DEVICE).to(DTYPE), empty(num_tokens, width)

            def check(x: Tensor = x, value: Tensor = value, residual: Tensor = residual, out: Tensor = out,
                      weight: Tensor = weight) -> float:  # fmt: skip
                expected = residual.float() + value
                rows.add_rms_norm(x, residual, weight, 1e-5, out)
                return max(error(residual, expected), error(out, reference.rms_norm(residual.float(), weight, 1e-5)))

            num_bytes = size_of(x, residual, residual, out, weight)
            for warps in (None, 4, 8, 16, 32) if sweep and num_tokens in SWEPT else (None,):
                call = partial(rows.add_rms_norm, x, residual, weight, 1e-5, out, num_warps=warps)
                size = f"h {width} t {num_tokens} p {num_parts}" + ("" if warps is None else f" warps {warps}")
                yield Case("norm", size, call, num_bytes, check if warps is None else None)


def activation_cases(sweep: bool) -> Iterator[Case]:
    reference = ReferenceOps(DEVICE, torch.float32)
    for width in (14336, 3072):
        for num_tokens, num_parts in steps():
            x, value = product(num_tokens, num_parts, 2 * width)
            out = empty(num_tokens, width)

            def check(x: Tensor = x, value: Tensor = value, out: Tensor = out) -> float:
                rows.activate_multiply(x, "silu", out)
                return error(out, reference.activate_multiply(value, "silu"))

            for block in (None, 256, 512, 1024, 2048) if sweep and num_tokens in SWEPT else (None,):
                call = partial(rows.activate_multiply, x, "silu", out, block=block)
                size = f"f {width} t {num_tokens} p {num_parts}" + ("" if block is None else f" block {block}")
                yield Case("activate", size, call, size_of(x, out), check if block is None else None)


def rotary_cases(sweep: bool) -> Iterator[Case]:
    reference = ReferenceOps(DEVICE, torch.float32)
    angles = 6 * torch.randn(STEPS[-1], 64, device=DEVICE)
    rope = RopeTable(angles.cos(), angles.sin())
    for heads, norm in ((32, None), (16, torch.randn(128, device=DEVICE).to(DTYPE))):
        spec = AttentionSpec(heads, 8, 128, 128, 1.0)
        for num_tokens, num_parts in steps():
            x, value = product(num_tokens, num_parts, spec.qkv_width)
            out = empty(num_tokens, spec.qkv_width)
            positions = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
            batch: Any = SimpleNamespace(positions=positions, slots=positions.flip(0))
            num_blocks = num_tokens // BLOCK_SIZE + 1
            cache, wanted = (
                LayerCache(*(torch.zeros(num_blocks, 8, BLOCK_SIZE, 128, dtype=d, device=DEVICE) for _ in range(2)))
                for d in (DTYPE, torch.float32)
            )
            launch = partial(rows.rotary_store, x, positions, batch.slots, cache, spec, rope, norm, norm, 1e-6, out)

            def check(value: Tensor = value, out: Tensor = out, cache: LayerCache = cache, wanted: LayerCache = wanted,
                      batch: Any = batch, spec: AttentionSpec = spec, norm: Tensor | None = norm,
                      launch: Callable[[], object] = launch) -> float:  # fmt: skip
                launch()
                reference.rotary_store(value, batch, wanted, spec, rope, norm, norm, 1e-6)
                return max(error(out, value), error(cache.k, wanted.k), error(cache.v, wanted.v))

            num_bytes = size_of(x, out) + num_tokens * (2 * 8 * 128 * 2 + 128 * 4)
            for per_program in (None, 1, 2, 4, 8) if sweep and num_tokens in SWEPT else (None,):
                size = f"w {spec.qkv_width} t {num_tokens} p {num_parts}"
                size += "" if per_program is None else f" heads {per_program}"
                call = partial(launch, heads=per_program)
                yield Case("rotary", size, call, num_bytes, check if per_program is None else None)


def small_cases() -> Iterator[Case]:
    table = torch.randn(128256, 4096, dtype=DTYPE, device=DEVICE)
    for num_tokens in STEPS:
        ids = torch.randint(0, 128256, (num_tokens,), dtype=torch.int32, device=DEVICE)
        out = empty(num_tokens, 4096)

        def check(ids: Tensor = ids, out: Tensor = out) -> float:
            rows.embedding(ids, table, 1.0, out)
            return error(out, table[ids.long()].float())

        call = partial(rows.embedding, ids, table, 1.0, out)
        yield Case("embedding", f"h 4096 t {num_tokens}", call, 2 * size_of(out), check)
    ids, previous = (torch.randint(-256, 1000, (256,), dtype=torch.int32, device=DEVICE) for _ in range(2))

    def check_resolved() -> float:
        fresh = torch.randint(-256, 1000, (256,), dtype=torch.int32, device=DEVICE)
        expected = torch.where(fresh < 0, previous[(-fresh - 1).clamp(0).long()].clamp(0), fresh)
        rows.resolve_tokens(fresh, previous)
        return 0.0 if torch.equal(fresh, expected) else torch.inf

    yield Case("resolve", "t 256", partial(rows.resolve_tokens, ids, previous), 3 * size_of(ids), check_resolved)


#: name → temperature, top_k, top_p, min_p, spread of the logits
DRAWS = {
    "greedy": (0.0, 0, 1.0, 0.0, 3.0),
    "plain": (1.0, 0, 1.0, 0.0, 3.0),
    "top-k 50": (1.0, 50, 1.0, 0.0, 3.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0, 3.0),
    "both": (0.7, 50, 0.9, 0.0, 3.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05, 3.0),
    "top-p 0.9, flat": (1.0, 0, 0.9, 0.0, 1.0),
}


def sample_cases() -> Iterator[Case]:
    for vocab_size in (128256, 151936):
        for num_rows in (1, 64, 256):
            noise = torch.randn(num_rows, vocab_size, device=DEVICE)
            for name, (temperature, top_k, top_p, min_p, spread) in DRAWS.items():
                columns = (
                    torch.full((num_rows,), temperature, device=DEVICE),
                    torch.full((num_rows,), top_k, dtype=torch.int64, device=DEVICE),
                    torch.full((num_rows,), top_p, device=DEVICE),
                    torch.full((num_rows,), min_p, device=DEVICE),
                )
                uniform = torch.rand(num_rows, dtype=torch.float64, device=DEVICE)
                logits = noise if spread == 1.0 else noise * spread
                has_filters = name not in ("greedy", "plain")
                draw = partial(sampling.sample, logits, *columns, has_filters=has_filters)
                check = partial(check_draws, draw, logits, columns, uniform)
                size = f"v {vocab_size} r {num_rows} {name}"
                call = partial(draw, uniform_r=uniform)
                if name == "greedy":
                    call = partial(sampling.argmax, logits)
                yield Case("sample", size, call, size_of(logits), check)


def check_draws(
    draw: Callable[[Tensor], Tensor], logits: Tensor, columns: tuple[Tensor, ...], uniform: Tensor
) -> float:
    """How far the uniform number must be moved, in 2e-6, for the definition in float64 to draw the same, if top_p
    may be moved by 1e-6 of itself: of nearly equal tokens, which is the last kept is a matter of rounding."""
    temperature, top_k, top_p, min_p = (column.double() for column in columns)
    tokens = draw(uniform).long().unsqueeze(1)
    if not temperature.any():
        return 0.0 if torch.equal(tokens[:, 0], logits.argmax(-1)) else torch.inf
    probs = torch.softmax(logits.double() / temperature.unsqueeze(1), -1)
    best = probs.sort(-1, descending=True).values
    least = torch.full_like(uniform, torch.inf)
    for shift in (-1e-6, 0.0, 1e-6):
        moved = torch.where(top_p < 1, top_p * (1 + shift), 1.0)
        cutoff = torch.maximum(sampling_reference._top_k_top_p(best, top_k, moved), min_p * best[:, 0])
        kept = torch.where(probs >= cutoff.unsqueeze(1), probs, 0.0)
        own = kept.gather(1, tokens).squeeze(1)
        kept = kept.cumsum(-1)
        until, whole = kept.gather(1, tokens).squeeze(1), kept[:, -1]
        distance = torch.maximum((until - own) / whole - uniform, uniform - until / whole).clamp_min(0)
        least = torch.minimum(least, torch.where(own > 0, distance, torch.inf))
    return float(least.max()) / 2e-6


def graph_seconds(call: Callable[[], object]) -> float:
    """Of one call: the fastest of several replays of a graph of many."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / CALLS)
    return best


GROUPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "norm": norm_cases,
    "activate": activation_cases,
    "rotary": rotary_cases,
    "small": lambda _: small_cases(),
    "sample": lambda _: sample_cases(),
}


def measure(group: str, sweep: bool, bandwidth: float, deadline: float) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    cases = list(GROUPS[group](sweep))
    with ThreadPoolExecutor(8) as pool:  # compiles what is compiled once
        list(pool.map(lambda case: case.call(), cases))
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{group}: the rest is left out, since the time is used up")
            return
        found = None if case.check is None else case.check()
        seconds = graph_seconds(case.call)
        floor = case.num_bytes / bandwidth
        verdict = "" if found is None else "ok" if found <= 1.01 else f"WRONG {found:.3g}"
        print(
            f"{case.kernel:9} {case.size:34} {seconds * 1e6:8.2f} µs  floor {floor * 1e6:7.2f}  {verdict}", flush=True
        )
        yield {"kernel": case.kernel, "size": case.size, "seconds": seconds, "floor": floor, "error": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--sweep", action="store_true", help="time the kernels' knobs")
    parser.add_argument("--seconds", type=float, default=60, help="stop after so long")
    parser.add_argument("--bandwidth", type=float, default=4.55e12, help="bytes per second of the floor")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU: PyTorch finds no CUDA device")
    deadline = time.monotonic() + options.seconds
    results = [r for group in options.only for r in measure(group, options.sweep, options.bandwidth, deadline)]
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [r for r in results if r["error"] is not None and not r["error"] <= 1.01]
    print(f"{record['gpu']}: {len(results)} measured, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
