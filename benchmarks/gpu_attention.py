"""The attention kernels of an NVIDIA GPU: checked against plain torch, then timed beside their floors.

    python benchmarks/gpu_attention.py [--json FILE] [--block-size 16 64] [--skip-alternatives]

Decoding is timed in CUDA graphs over as many KV caches as exceed the L2 cache, one after the other, as a
model's layers are; its floor is the bytes of K and V by --bandwidth. Prefill is given in TFLOP/s of the causal
half. Alternatives of tile, warps, stages and programs are timed on a few shapes, best first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.triton import attention as dispatch
from turbolm.ops.triton.attention import attention
from turbolm.ops.triton.decode import DecodePlan, decode_attention, plan_decode
from turbolm.ops.triton.prefill import PrefillPlan, plan_prefill, prefill_attention
from turbolm.types import Batch

DEVICE = torch.device("cuda")
LLAMA = AttentionSpec(32, 8, 128, 128, 128**-0.5)
QWEN = AttentionSpec(16, 8, 128, 128, 128**-0.5)
DECODE = [(LLAMA, s, c) for s, c in ((1, 300), (1, 8192), (1, 131072), (8, 300), (64, 300), (256, 264), (64, 4096))]
DECODE += [(QWEN, 256, 600)]
PREFILL: dict[str, list[tuple[int, int]]] = {
    "1 x 2048": [(2048, 2048)],
    "1 x 8192": [(8192, 8192)],
    "16 x 512 ragged": [(256 + 32 * i + i % 7, 256 + 32 * i + i % 7) for i in range(16)],
    "2048 at 16384": [(2048, 16384)],
}
COLD_BYTES = 160 << 20
Sequences = list[tuple[int, int]]  # new tokens, context with them


def make_step(spec: AttentionSpec, sequences: Sequences, block_size: int, copies: int = 1) -> Any:
    """→ qkv, batch, caches: random K and V of the context in blocks in random order, `copies` times."""
    counts, contexts = [new for new, _ in sequences], [context for _, context in sequences]
    needed = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(needed)).tolist()
    tables = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
    for i, blocks in enumerate(needed):
        tables[i, :blocks] = torch.tensor([order.pop() for _ in range(blocks)])
    starts = [0, *itertools.accumulate(counts)]
    first = next((i for i, new in enumerate(counts) if new > 1), len(counts))
    ints = torch.zeros(starts[-1], dtype=torch.int32, device=DEVICE)
    batch = Batch(
        ints, ints, ints, torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE), tables.to(DEVICE), ints, starts[-1], len(sequences),
        max(counts), max(contexts), first, tuple(zip(starts[first:], counts[first:], contexts[first:], strict=False)),
    )  # fmt: skip
    qkv = torch.randn(starts[-1], spec.qkv_width, dtype=torch.bfloat16, device=DEVICE)
    caches = [
        LayerCache(
            *(
                torch.randn(sum(needed), spec.num_kv_heads, block_size, dim, dtype=torch.bfloat16, device=DEVICE)
                for dim in (spec.head_dim, spec.v_head_dim)
            )
        )
        for _ in range(copies)
    ]
    return qkv, batch, caches


def store(qkv: Tensor, batch: Batch, cache: LayerCache, spec: AttentionSpec) -> None:
    """K and V of the step's rows into the cache, which fresh chunks read from qkv."""
    size = cache.block_size
    k_end = spec.q_width + spec.num_kv_heads * spec.head_dim
    k = qkv[:, spec.q_width : k_end].unflatten(1, (spec.num_kv_heads, -1))
    v = qkv[:, k_end:].unflatten(1, (spec.num_kv_heads, -1))
    starts, contexts = batch.query_start.tolist(), batch.context_lens.tolist()
    for i, (first, last) in enumerate(itertools.pairwise(starts)):
        position = torch.arange(contexts[i] - (last - first), contexts[i], device=DEVICE)
        block = batch.block_tables[i].long()[position // size]
        cache.k[block, :, position % size] = k[first:last]
        cache.v[block, :, position % size] = v[first:last]


def out_of(qkv: Tensor, spec: AttentionSpec) -> Tensor:
    return torch.empty(qkv.shape[0], spec.num_heads * spec.v_head_dim, dtype=qkv.dtype, device=DEVICE)


def check() -> None:
    """Every path against float32; twice, for the same bits."""
    reference = ReferenceOps(DEVICE, torch.float32)
    decodes = [(1, c) for c in (1, 17, 300, 64, 3000, 1025, 2, 700)]
    mixed = [*decodes, (3, 900), (700, 700), (1100, 1100), (100, 5000), (33, 33)]
    cases = {
        "decode": (LLAMA, decodes),
        "decode, one long": (LLAMA, [(1, 40000)]),
        "mixed": (LLAMA, mixed),
        "drafts": (LLAMA, [(1, 50), (4, 900), (5, 5), (2, 4097)]),
        "window": (replace(LLAMA, window=500), mixed),
        "softcap": (replace(LLAMA, softcap=30.0), mixed),
        "heads of 64, groups of 3": (AttentionSpec(9, 3, 64, 64, 0.125), mixed),
        "heads of 80, no groups": (AttentionSpec(8, 8, 80, 80, 80**-0.5), mixed),
        "heads of 256": (AttentionSpec(16, 8, 256, 256, 0.0625, window=1024, softcap=50.0), mixed),
    }
    for name, (spec, sequences) in cases.items():
        for block_size in (16, 64):
            qkv, batch, (cache,) = make_step(spec, sequences, block_size)
            store(qkv, batch, cache, spec)
            outs = [out_of(qkv, spec) for _ in range(2)]
            for out in outs:
                attention(qkv, batch, cache, spec, out)
            exact = LayerCache(cache.k.float(), cache.v.float())
            many = replace(batch, max_query=2)  # sequence by sequence: the reference gathers whole contexts
            expected = reference.attention(qkv.float(), many, exact, spec)
            right = torch.isclose(outs[0].float(), expected, atol=1e-2, rtol=2e-2)
            assert right.all(), f"{name}, blocks of {block_size}: {int((~right).sum())} of {right.numel()} are wrong"
            assert torch.equal(*outs), f"{name}: not deterministic"
        print(f"  {name}: right", flush=True)


def graph_seconds(calls: list[Callable[[], None]]) -> float:
    """Median seconds per call of a graph of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)


def gpu() -> Any:
    return dispatch.gpu_of(torch.device("cuda", torch.cuda.current_device()))


def decode_calls(spec: AttentionSpec, step: Any, plan: DecodePlan) -> list[Callable[[], None]]:
    qkv, batch, caches = step
    out = out_of(qkv, spec)

    def call(cache: LayerCache) -> None:
        decode_attention(
            qkv, batch.block_tables, batch.context_lens, cache, spec, out, plan=plan, counters=gpu().counters,
            max_context=batch.max_context, pdl=gpu().pdl,
        )  # fmt: skip

    return [lambda cache=cache: call(cache) for cache in caches * -(-4 // len(caches))]  # type: ignore[misc]


def time_decode(bandwidth: float, block_sizes: list[int], alternatives: bool) -> list[dict[str, Any]]:
    records = []
    for block_size, (spec, count, context) in itertools.product(block_sizes, DECODE):
        num_bytes = count * context * spec.num_kv_heads * (spec.head_dim + spec.v_head_dim) * 2
        step = make_step(spec, [(1, context)] * count, block_size, min(160, -(-COLD_BYTES // num_bytes)))
        rule = plan_decode(spec, step[2][0], gpu().num_sms, gpu().shared_memory, count, context)
        plans = [rule]
        if alternatives and block_size == block_sizes[0]:
            plans += [replace(rule, programs=gpu().num_sms * n) for n in (1, 2, 4, 6)]
            plans += alternatives_of(rule) if (count, context) in ((1, 300), (64, 4096)) else []
        results = []
        for plan in plans:
            try:
                results.append((graph_seconds(decode_calls(spec, step, plan)), plan))
            except (RuntimeError, ValueError) as error:
                print(f"  {plan}: {error}")
        floor = num_bytes / bandwidth
        for rank, (seconds, plan) in enumerate([results[0], *sorted(results[1:], key=lambda r: r[0])[:5]]):
            chosen = "rule" if rank == 0 else "    "
            print(
                f"  {chosen} {spec.num_heads:2}/{spec.num_kv_heads} {count:4} x {context:6} block {block_size:3} "
                f"{seconds * 1e6:8.1f} µs  floor {floor * 1e6:7.1f}  {floor / seconds:4.0%}  {describe(plan)}",
                flush=True,
            )
            records.append({"kind": "decode", "sequences": count, "context": context, "heads": spec.num_heads,
                            "block_size": block_size, "seconds": seconds, "floor": floor, **asdict(plan)})  # fmt: skip
        del step
    return records


def alternatives_of(rule: DecodePlan) -> list[DecodePlan]:
    """Others that are worth a try: shapes of the pipeline, and where divided pairs are put together."""
    sms = gpu().num_sms
    plans = [replace(rule, reduce_apart=True)]
    for tile, warps, stages, per_sm in (
        (64, 4, 2, 4), (64, 4, 4, 2), (64, 2, 3, 3), (64, 8, 3, 2), (32, 4, 4, 4), (32, 2, 3, 6), (32, 1, 3, 6),
        (128, 4, 2, 2), (128, 8, 2, 2), (128, 8, 3, 1),
    ):  # fmt: skip
        plans.append(DecodePlan(tile, sms * per_sm, warps, stages))
    return plans


def describe(plan: DecodePlan | PrefillPlan) -> str:
    return " ".join(f"{name} {value}" for name, value in asdict(plan).items())


def time_prefill(block_sizes: list[int], alternatives: bool) -> list[dict[str, Any]]:
    records = []
    for block_size, (name, sequences) in itertools.product(block_sizes, PREFILL.items()):
        qkv, batch, (cache,) = make_step(LLAMA, sequences, block_size)
        store(qkv, batch, cache, LLAMA)
        out = out_of(qkv, LLAMA)
        pairs = sum(new * context - new * (new - 1) / 2 for new, context in sequences)
        flops = 4 * LLAMA.num_heads * LLAMA.head_dim * pairs

        def kernel(plan: PrefillPlan, qkv: Tensor = qkv, batch: Batch = batch, cache: LayerCache = cache) -> None:
            prefill_attention(
                qkv, batch.query_start, batch.chunks, batch.block_tables, batch.context_lens, cache, LLAMA,
                out_of(qkv, LLAMA), plan=plan, pdl=gpu().pdl,
            )  # fmt: skip

        begin = time.perf_counter()
        attention(qkv, batch, cache, LLAMA, out)
        torch.cuda.synchronize()
        first_call = time.perf_counter() - begin
        rule = plan_prefill(LLAMA, 2, gpu().shared_memory - 1024, batch.max_query)
        plans = [rule]
        if alternatives and block_size == block_sizes[0] and name in ("1 x 8192", "2048 at 16384"):
            plans += [PrefillPlan(*knobs) for knobs in (
                (128, 64, 8, 2), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2),
                (64, 64, 4, 3), (64, 128, 4, 2), (256, 64, 8, 2),
            )]  # fmt: skip
        results: list[tuple[float, str]] = []
        seconds = graph_seconds([lambda: attention(qkv, batch, cache, LLAMA, out)] * 2)  # noqa: B023
        results.append((seconds, f"as dispatched (first call {first_call * 1e3:.0f} ms)"))
        for plan in plans:
            try:
                seconds = graph_seconds([lambda: kernel(plan)] * 2)  # noqa: B023
            except (RuntimeError, ValueError) as error:
                print(f"  {plan}: {error}")
                continue
            results.append((seconds, ("rule: " if plan == rule else "") + describe(plan)))
        for seconds, what in [*results[:2], *sorted(results[2:])[:4]]:
            speed = f"{seconds * 1e6:8.0f} µs {flops / seconds / 1e12:5.0f} TFLOP/s"
            print(f"  {name:16} block {block_size:3} {speed}  {what}", flush=True)
            records.append({"kind": "prefill", "name": name, "block_size": block_size, "seconds": seconds,
                            "flops": flops, "what": what})  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--block-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--bandwidth", type=float, default=4.55e12, help="bytes per second of the floor")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-alternatives", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    begin = time.perf_counter()
    if not options.skip_checks:
        print("checks")
        check()
    print(f"decode ({time.perf_counter() - begin:.0f} s)")
    records = time_decode(options.bandwidth, options.block_size, not options.skip_alternatives)
    print(f"prefill ({time.perf_counter() - begin:.0f} s)")
    records += time_prefill(options.block_size, not options.skip_alternatives)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "records": records}, indent=1))


if __name__ == "__main__":
    main()
