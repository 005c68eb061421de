"""LoRA adapters on a GPU: what the kernels add, checked against plain torch, and the time that they take.

    python benchmarks/gpu_adapters.py

One table: microseconds of both kernels for the merged q, k and v of an 8B model (4096 → 6144) with eight adapters of
rank 16, by number of rows, as a CUDA graph replays them; beside it the matrix product itself. Ends with status 1 where
a sum is wrong, or where a row's bits depend on the rows beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from turbolm.ops import AdapterWeights
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.triton.adapters import add_adapters

DEVICE = torch.device("cuda")
NUM_ADAPTERS, RANK, WIDTH, ENDS = 8, 16, 4096, (4096, 5120, 6144)
ROWS = (1, 4, 16, 64, 256, 2048)
_REPEATS = 50


def weights() -> AdapterWeights:
    a = torch.randn(NUM_ADAPTERS, len(ENDS) * RANK, WIDTH, device=DEVICE, dtype=torch.bfloat16) / WIDTH**0.5
    b = torch.randn(NUM_ADAPTERS, RANK, ENDS[-1], device=DEVICE, dtype=torch.bfloat16) / RANK**0.5
    return AdapterWeights(a, b, torch.full((NUM_ADAPTERS,), RANK, dtype=torch.int32, device=DEVICE), ENDS)


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and places: neighbours have different adapters, some none."""
    x = torch.randn(rows, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randn(rows, ENDS[-1], device=DEVICE, dtype=torch.bfloat16)
    places = torch.arange(rows, dtype=torch.int32, device=DEVICE) % (NUM_ADAPTERS + 1) - 1
    return x, y, places


def is_right(own: AdapterWeights, rows: int) -> bool:
    x, y, places = inputs(rows)
    exact = AdapterWeights(own.a.float(), own.b.float(), own.ranks, own.ends)
    expected = ReferenceOps(DEVICE, torch.float32).add_adapters(y.float(), x.float(), exact, places)
    out, last = torch.empty_like(y), torch.empty_like(y[-1:])
    add_adapters(y, x, own, places, out)
    add_adapters(y[-1:], x[-1:], own, places[-1:], last)
    is_close = bool(((out.float() - expected).abs() <= 0.02 + 0.01 * expected.abs()).all())
    return is_close and torch.equal(out[-1:], last)


def microseconds(compute: Callable[[], object]) -> float:
    """Of one call among many in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_REPEATS):
            compute()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * begin.elapsed_time(end) / _REPEATS


def main() -> int:
    own, wrong = weights(), 0
    matrix = torch.randn(ENDS[-1], WIDTH, device=DEVICE, dtype=torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}\n{'rows':>6} {'adapters':>10} {'none':>10} {'product':>10}   µs")
    for rows in ROWS:
        x, y, places = inputs(rows)
        nobody = torch.full_like(places, -1)
        times = [microseconds(partial(add_adapters, y, x, own, chosen, y)) for chosen in (places, nobody)]
        times.append(microseconds(partial(torch.nn.functional.linear, x, matrix)))
        ok = is_right(own, rows)
        wrong += not ok
        print(f"{rows:>6} " + " ".join(f"{value:>10.1f}" for value in times) + ("" if ok else "   WRONG"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
