"""A model over several GPUs of one machine: whether it computes what one GPU does, and how fast.

python benchmarks/gpu_tensor_parallel.py --gpus 2 --out DIR [--models DIR] [--seconds 420] [--only NAME ...]

Parts, each in processes of its own with a time limit; where one runs out, all its processes print their stacks:
sums       sums over ranks with residual and norm, and choosing tokens: each way, checked and timed in CUDA graphs
parity     greedy answers, log-probabilities and perplexity of a tiny model beside float32 on the CPU
features   drafts, penalties, an adapter and `deterministic` beside one GPU's answers (gpu_parallel_features.py)
8b, 70b    the decode and ShareGPT-like workloads of gpu_workloads.py, 256 tokens out, sampled at temperature 1
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from gpu_models import SHAPES
from gpu_record import Clock, number, start_record, table, write
from gpu_throughput import HEADER, Bench, Row, _measured
from gpu_workloads import Costs, workloads

from turbolm import AsyncLLM
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.shard import Shard

FOLDER = Path(__file__).parent
STEPS_IN_GRAPH = 32

#: What vLLM 0.23 reaches (dummy weights, its own all-reduce kernels), and what is asked of turbolm: tok/s; W2: req/s.
PEERS = {
    ("llama-3-8b", 2): {
        "batch 1": (286.8, 320), "batch 64": (15090, 16500), "batch 256": (36160, 40000), "W2": (89.2, 100),
    },
    ("llama-3-8b", 4): {
        "batch 1": (373.9, 430), "batch 64": (18880, 21500), "batch 256": (44760, 52000), "W2": (114.8, 135),
    },
    ("llama-3-70b", 4): {"batch 1": (81.0, 90), "batch 64": (4285, 4700)},
}  # fmt: skip


# Part "sums": one process per GPU


def graph_microseconds(work: Callable[[], object], group: ProcessGroup) -> float:
    """Of one call, in a CUDA graph of many; every rank must measure the same."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(STEPS_IN_GRAPH):
            work()
    times = []
    for _ in range(6):
        group.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / STEPS_IN_GRAPH)
    return sorted(times)[len(times) // 2]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def sum_ways(group: ProcessGroup, rows: int, width: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to add x of all ranks to the residual and take the norm; each gives (norm, residual) stacked."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric_memory

    from turbolm.ops.triton import peers
    from turbolm.ops.triton import rows as row_kernels

    generator = torch.Generator("cuda").manual_seed(group.rank)
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, generator=generator)
    start = torch.randn(
        rows, width, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(9)
    )
    weight = torch.rand(width, device="cuda")
    weight.copy_(torch.linspace(0.5, 1.5, width))
    residual, out, summed = start.clone(), torch.empty_like(x), torch.empty_like(x)
    symmetric = symmetric_memory.empty(rows, width, dtype=torch.bfloat16, device=x.device)
    symmetric_memory.rendezvous(symmetric, dist.group.WORLD)
    name = dist.group.WORLD.group_name

    def norm(found: torch.Tensor) -> torch.Tensor:
        residual.copy_(start)
        row_kernels.add_rms_norm(found, residual, weight, 1e-5, out)
        return out

    def nccl() -> torch.Tensor:
        summed.copy_(x)
        group.all_reduce(summed)
        return norm(summed)

    def one_shot() -> torch.Tensor:
        symmetric.copy_(x)
        return norm(torch.ops.symm_mem.one_shot_all_reduce(symmetric, "sum", name))

    def two_shot() -> torch.Tensor:
        symmetric.copy_(x)
        return norm(torch.ops.symm_mem.two_shot_all_reduce_(symmetric, "sum", name))

    ways: dict[str, Callable[[], torch.Tensor]] = {"NCCL": nccl, "one-shot": one_shot, "two-shot": two_shot}
    memory = group.share(peers.Inbox.num_bytes(group.size, rows, width, torch.bfloat16))
    if memory is not None:
        counts = torch.zeros(rows, dtype=torch.int64, device="cuda")
        inbox = peers.Inbox(memory, counts, group.rank, group.size, rows, width, torch.bfloat16)

        def fused() -> torch.Tensor:
            residual.copy_(start)
            summed.copy_(x)  # as the others do
            peers.reduce_add_rms_norm(summed, residual, weight, 1e-5, out, inbox)
            return out

        ways["turbolm"] = fused
    return ways


def choice_ways(group: ProcessGroup, rows: int, width: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to choose a token per row."""
    from turbolm.ops.triton import sampling
    from turbolm.ops.triton.sharded_sampling import SharedLogits, sample

    vocab_size = group.size * width - 700
    logits, inbox = group.share(rows * width * 4), group.share(SharedLogits.inbox_bytes(group.size, rows, width))
    assert logits is not None and inbox is not None
    own = logits.local.view(torch.float32).view(rows, width)
    own.copy_(random(group.rank, rows, width) * 2)
    temperature = torch.ones(rows, device="cuda")
    temperature[::4] = 0
    uniform = torch.linspace(0, 0.999, rows, device="cuda", dtype=torch.float64)
    neutral = (
        torch.zeros(rows, dtype=torch.int32, device="cuda"),
        temperature.new_ones(rows),
        temperature.new_zeros(rows),
    )
    counts = torch.zeros(rows, dtype=torch.int64, device="cuda")
    shared = SharedLogits(logits, inbox, counts, group.rank, group.size, rows, width, vocab_size)

    def gather() -> torch.Tensor:
        whole = group.all_gather(own).transpose(0, 1).flatten(1)[:, :vocab_size]
        return sampling.sample(whole, temperature, *neutral, uniform, has_filters=False)

    return {"gather": gather, "turbolm": lambda: sample(rows, temperature, uniform, shared)}


def measure_sums(rank: int, size: int, store: Path, path: Path) -> None:
    group = ProcessGroup(Shard(rank, size), torch.device("cuda", rank), store)
    record: dict[str, Any] = {"sums": [], "choices": [], "ok": True}
    jobs = [("sums", sum_ways, rows, 4096) for rows in (1, 8, 64, 256, 1024, 2048, 8192)]
    jobs += [("choices", choice_ways, rows, 126 // size * 1024) for rows in (1, 64, 256)]
    for kind, make, rows, width in jobs:
        ways = make(group, rows, width)
        results = {name: way().clone().float() for name, way in ways.items()}
        torch.cuda.synchronize()
        first = next(iter(results.values()))
        distances = {name: float((found - first).abs().max()) for name, found in results.items()}
        entry: dict[str, Any] = {"rows": rows, "distance": distances, "us": {}}
        limit = 0 if kind == "choices" else 0.2  # a few units in the last place of bfloat16
        record["ok"] &= all(distance <= limit for distance in distances.values())
        for name, way in ways.items():
            entry["us"][name] = graph_microseconds(way, group)
        record[kind].append(entry)
        if rank == 0:
            times = ", ".join(f"{name} {number(value)}" for name, value in entry["us"].items())
            far = ", ".join(f"{name} {value:.3g}" for name, value in distances.items() if value)
            print(f"  {kind} {rows} rows: {times} us" + (f"; differ: {far}" if far else ""), flush=True)
            write(path, record)
    torch.cuda.synchronize()
    if rank == 0 and not record["ok"]:
        print("WRONG RESULTS")
        os._exit(1)
    os._exit(0)  # leaving the group in order would wait for all


def run_sums(size: int, path: Path) -> int:
    """Starts a process per GPU and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--gpus", str(size), "--out", str(path), "--store", f"{folder}/store"]
        processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(size)]
        codes = []
        while processes and not any(codes):
            codes += [code for process in processes if (code := process.poll()) is not None]
            processes = [process for process in processes if process.poll() is None]
            time.sleep(0.1)
        for process in processes:
            process.kill()
    return max((abs(code) for code in codes), default=0)


# Part "8b" and "70b"


async def measure_model(folder: Path, shape: str, options: argparse.Namespace, record: dict[str, Any]) -> list[Row]:
    settings = {
        "tensor_parallel": options.gpus, "prefix_cache": False, "speculation": "off", "max_context": 16384,
        "device": options.device, **json.loads(options.engine),
    }  # fmt: skip
    start, rows = time.perf_counter(), []
    async with AsyncLLM(str(folder), progress=False, **settings) as llm:
        print(f"{shape} on {options.gpus} GPUs, loaded in {time.perf_counter() - start:.1f} s", flush=True)
        await llm.wait_until_warm()
        record["warm_seconds"] = time.perf_counter() - start
        print(f"  warm after {record['warm_seconds']:.1f} s\n  " + "\n  ".join(llm.config.reasons), flush=True)
        given = SimpleNamespace(model=folder, must=None, greedy=options.greedy, stream=False)
        bench = Bench(llm, "", Clock(options.seconds), given)
        bench.costs = Costs(*(value / options.gpus for value in astuple(bench.costs)))
        record["runs"] = bench.runs
        await bench.warm()
        vocab_size = SHAPES[shape].vocab_size
        wanted = ["batch 1", "batch 64", "batch 256", "W2"]
        known = PEERS.get((shape, options.gpus), {})
        for work in [*workloads("w1", vocab_size), *workloads("w2", vocab_size)]:
            name = work.name.removeprefix("W1 ")
            if name not in wanted:
                continue
            shorter = replace(work, asks=work.shortened(256)) if work.kind == "decode" else work
            for row in await _measured(bench, shorter, vocab_size):
                if name in known and row.figure is not None:
                    figure, must = known[name]
                    row = replace(row, peer="vLLM", peer_figure=figure, ratio=row.figure / figure, must=must / figure)
                rows.append(row)
                print(f"  {' '.join(row.cells)}", flush=True)
            record["rows"] = [asdict(row) for row in rows]
            write(options.out / f"{shape}.json", record)
    return rows


def run_model(shape: str, options: argparse.Namespace) -> None:
    folder = options.models / shape
    if not (folder / "config.json").is_file():
        command = [sys.executable, str(FOLDER / "gpu_models.py"), shape, "--out", str(folder)]
        subprocess.run(command, check=True, timeout=240)
    rows = asyncio.run(measure_model(folder, shape, options, start_record("gpu_tensor_parallel", options)))
    print(table(HEADER, [row.cells for row in rows]))


# All parts


def run_part(name: str, command: list[str], seconds: float) -> str:
    """ "ok", or why not. Where the time runs out, every process of the part prints where it is."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    print(f"--- {name}, up to {seconds:.0f} s", flush=True)
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait(seconds)
        return "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in tree:
            print(f"stacks of process {member.pid}: {' '.join(member.cmdline())[-120:]}", flush=True)
            member.send_signal(signal.SIGABRT)  # faulthandler prints all threads' stacks
            time.sleep(1)
        for member in tree:
            if member.is_running():
                member.kill()
        return f"stopped after {seconds:.0f} s"


def run_all(options: argparse.Namespace) -> None:
    me = [sys.executable, __file__, "--gpus", str(options.gpus), "--models", str(options.models)]
    own = [*me, "--out", str(options.out), "--engine", options.engine, "--device", options.device]
    parity = [sys.executable, str(FOLDER / "gpu_parity.py"), "tiny", "--dtype", "bfloat16", "--prompts", "32"]
    parity += ["--json", str(options.out / "parity.json"), "-o", f"tensor_parallel={options.gpus}"]
    features = [sys.executable, str(FOLDER / "gpu_parallel_features.py"), "--gpus", str(options.gpus)]
    features += ["--json", str(options.out / "features.json")]
    parts = {
        "sums": ([*own, "--part", "sums"], 90.0),
        "parity": (parity, 120.0),
        "features": (features, 240.0),
        "8b": ([*own, "--part", "llama-3-8b", "--seconds", "120"], 240.0),
    }
    if options.gpus >= 4:
        parts["70b"] = ([*own, "--part", "llama-3-70b", "--seconds", "90"], 400.0)
    clock, states = Clock(options.seconds), {}
    for name, (command, seconds) in parts.items():
        if options.only and name not in options.only:
            continue
        states[name] = run_part(name, command, min(seconds, clock.left)) if clock.left > 20 else "skipped: no time left"
    print("\n".join(f"{name}: {state}" for name, state in states.items()))
    sys.exit(0 if all(state == "ok" for state in states.values()) else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/turbolm-models"), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sums, parity, features, 8b, 70b")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--engine", default="{}", metavar="JSON", help="fields of EngineConfig")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu: to try the script")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    faulthandler.enable()
    if options.rank is not None:
        measure_sums(options.rank, options.gpus, options.store, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "sums":
        sys.exit(run_sums(options.gpus, options.out / "sums.json"))
    elif options.part is not None:
        run_model(options.part, options)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
