"""The quantized KV cache on an NVIDIA GPU: store and attention checked against plain torch, then timed beside floors.

    python benchmarks/gpu_kv.py [--json FILE] [--skip-checks] [--skip-alternatives] [--kinds int8 int4 …]

Steps are timed in CUDA graphs over as many KV caches as exceed the L2 cache. The floor of decoding is the bytes of
codes and scales by --bandwidth; prefill is given in TFLOP/s of the causal half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_attention import (
    COLD_BYTES,
    DEVICE,
    LLAMA,
    Sequences,
    decode_calls,
    describe,
    gpu,
    graph_seconds,
    make_step,
    out_of,
)
from torch import Tensor

from turbolm.cache.spec import CacheSpec
from turbolm.kv import KvFormat, KvKind, KvShape
from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops.reference import ReferenceOps, dequantize_heads, quantize_heads
from turbolm.ops.triton.attention import attention
from turbolm.ops.triton.decode import DecodePlan, plan_decode
from turbolm.ops.triton.prefill import plan_prefill, prefill_attention
from turbolm.ops.triton.rotary import rotary_store
from turbolm.ops.triton.tiles import pair_tokens

BLOCK_SIZE = 64
FORMATS: dict[str, tuple[KvKind, KvKind]] = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "int4"),
    "fp8": ("fp8", "fp8"),
    "int8:k,int4:v": ("int8", "int4"),
}
DECODE = ((64, 4096), (64, 300), (256, 600), (8, 4096), (1, 32768))
#: tile, warps, stages, programs per multiprocessor, registers
ALTERNATIVES = (
    (64, 1, 3, 8, None), (64, 1, 2, 9, None), (64, 1, 4, 8, None), (64, 1, 3, 12, 168), (64, 1, 2, 16, 128),
    (32, 1, 3, 9, None), (32, 1, 4, 12, 168), (32, 1, 3, 16, 128), (128, 1, 2, 8, None), (64, 2, 3, 5, None),
    (64, 4, 3, 3, 168), (128, 4, 2, 2, None),
)  # fmt: skip
Record = dict[str, Any]


def coded(cache: LayerCache, kinds: tuple[KvKind, KvKind]) -> LayerCache:
    """A cache of bfloat16 in other kinds, as the reference lays it out."""
    (k, k_scales), (v, v_scales) = (quantize_heads(x, kind) for x, kind in zip((cache.k, cache.v), kinds, strict=True))
    return LayerCache(k, v, k_scales, v_scales, *kinds)


def exact(cache: LayerCache) -> LayerCache:
    """What the codes stand for, in float32."""
    return LayerCache(
        dequantize_heads(cache.k, cache.k_scales, cache.kind_k), dequantize_heads(cache.v, cache.v_scales, cache.kind_v)
    )


def num_bytes_of(spec: AttentionSpec, kinds: tuple[KvKind, KvKind], positions: int) -> int:
    return positions * KvShape(spec.num_kv_heads, spec.head_dim, spec.v_head_dim).bytes_per_token(*kinds)


def check_attention(kinds: tuple[KvKind, KvKind]) -> None:
    reference = ReferenceOps(DEVICE, torch.float32)
    decodes = [(1, c) for c in (1, 17, 300, 64, 3000, 1025, 2, 700)]
    mixed = [*decodes, (3, 900), (700, 1500), (100, 5000), (33, 40)]
    for name, spec, sequences in (
        ("decode", LLAMA, decodes),
        ("mixed", LLAMA, mixed),
        ("drafts", LLAMA, [(1, 50), (4, 900), (5, 5), (2, 4097)]),
        ("window, softcap", replace(LLAMA, window=500, softcap=30.0), mixed),
        ("heads of 64, groups of 3", AttentionSpec(9, 3, 64, 64, 0.125), mixed),
        ("heads of 80", AttentionSpec(8, 8, 80, 80, 80**-0.5), mixed),
        ("heads of 256", AttentionSpec(8, 4, 256, 256, 0.0625), mixed),
    ):
        qkv, batch, (cache,) = make_step(spec, sequences, BLOCK_SIZE)
        plain = coded(cache, kinds)
        outs = [out_of(qkv, spec) for _ in range(2)]
        for out in outs:
            attention(qkv, batch, pair_tokens(plain), spec, out)
        expected = reference.attention(qkv.float(), replace(batch, max_query=2), exact(plain), spec)
        right = torch.isclose(outs[0].float(), expected, atol=1e-2, rtol=2e-2)
        assert right.all(), f"{name}, {kinds}: {int((~right).sum())} of {right.numel()} are wrong"
        assert torch.equal(*outs), f"{name}, {kinds}: not deterministic"


def store_case(num_tokens: int, kinds: tuple[KvKind, KvKind]) -> tuple[Callable[[], None], LayerCache, Tensor, Any]:
    """The launch, its cache, the rows (finished in place), and the batch."""
    angles = 6 * torch.randn(8192, 64, device=DEVICE)
    rope = RopeTable(angles.cos(), angles.sin())
    shape = KvShape(LLAMA.num_kv_heads, LLAMA.head_dim, LLAMA.v_head_dim)
    blocks = num_tokens // BLOCK_SIZE + 1
    (cache,) = CacheSpec((shape,), KvFormat(*kinds, "bfloat16")).allocate(blocks, BLOCK_SIZE, DEVICE)
    rows = torch.randn(num_tokens, LLAMA.qkv_width, dtype=torch.bfloat16, device=DEVICE)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE)
    batch = SimpleNamespace(positions=positions, slots=positions.flip(0).contiguous())

    def launch() -> None:
        rotary_store(rows, positions, batch.slots, cache, LLAMA, rope, None, None, 1e-6, rows)

    return launch, cache, rows, batch


def check_store(kinds: tuple[KvKind, KvKind]) -> None:
    """To the bit what the reference makes of the finished rows."""
    launch, cache, rows, batch = store_case(1000, kinds)
    launch()
    wanted = replace(
        cache, **{name: torch.zeros_like(pool) for name in ("k", "v", "k_scales", "v_scales")
                  if (pool := getattr(cache, name)) is not None},
    )  # fmt: skip
    ReferenceOps(DEVICE, torch.bfloat16).rotary_store(rows.clone(), batch, wanted, LLAMA, None, None, None, 1e-6)
    paired = pair_tokens(wanted)
    for name in ("k", "v", "k_scales", "v_scales"):
        found, expected = getattr(cache, name), getattr(paired, name)
        if found is not None:
            same = found.view(torch.uint8) == expected.view(torch.uint8)
            assert same.all(), f"store of {name}, {kinds}: {int((~same).sum())} of {same.numel()} bytes differ"


def compiled(calls: list[Callable[[], None]]) -> None:
    """Run each once, several at a time: most of it is compiling."""

    def attempt(call: Callable[[], None]) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            print(f"  {error}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, calls))
    torch.cuda.synchronize()


def random_step(sequences: Sequences, kinds: tuple[KvKind, KvKind], num_copies: int) -> Any:
    """As `make_step`, with caches of these kinds."""
    qkv, batch, (cache,) = make_step(LLAMA, sequences, BLOCK_SIZE)
    made = pair_tokens(coded(cache, kinds))
    names = [name for name in ("k", "v", "k_scales", "v_scales") if getattr(made, name) is not None]
    copies = [replace(made, **{name: getattr(made, name).clone() for name in names}) for _ in range(num_copies - 1)]
    return qkv, batch, [made, *copies]


def time_decode(name: str, bandwidth: float, alternatives: bool) -> list[Record]:
    kinds, sms, records = FORMATS[name], gpu().num_sms, []
    for count, context in DECODE:
        num_bytes = num_bytes_of(LLAMA, kinds, count * context)
        step = random_step([(1, context)] * count, kinds, min(64, -(-COLD_BYTES // num_bytes)))
        rule = plan_decode(LLAMA, step[2][0], sms, gpu().shared_memory, count, context)
        plans = [rule]
        if alternatives and name in ("int8", "int4", "fp8") and (count, context) in ((64, 4096), (64, 300)):
            plans += [DecodePlan(t, sms * p, w, s, registers=r) for t, w, s, p, r in ALTERNATIVES]
        compiled([decode_calls(LLAMA, step, plan)[0] for plan in plans])
        results = []
        for plan in plans:
            try:
                results.append((graph_seconds(decode_calls(LLAMA, step, plan)), plan))
            except (RuntimeError, ValueError) as error:
                print(f"  {plan}: {error}")
        floor = num_bytes / bandwidth
        for rank, (seconds, plan) in enumerate([results[0], *sorted(results[1:], key=lambda r: r[0])[:6]]):
            print(
                f"  {'rule' if rank == 0 else '    '} {name:13} {count:4} x {context:6} {seconds * 1e6:8.1f} µs  floor "
                f"{floor * 1e6:7.1f}  {floor / seconds:4.0%}  {describe(plan)}", flush=True,
            )  # fmt: skip
            records.append({"kind": "decode", "kv": name, "sequences": count, "context": context, "seconds": seconds,
                            "floor": floor, **asdict(plan)})  # fmt: skip
    return records


def time_prefill(name: str) -> list[Record]:
    records = []
    for what, new, context in (("2048 at 16384", 2048, 16384), ("512 at 2048", 512, 2048)):
        qkv, batch, (cache,) = random_step([(new, context)], FORMATS[name], 1)
        flops = 4 * LLAMA.num_heads * LLAMA.head_dim * (new * context - new * (new - 1) / 2)
        rule = plan_prefill(LLAMA, 2, gpu().shared_memory - 1024, new)
        for plan in (rule, replace(rule, num_stages=2), replace(rule, rows=64, num_warps=4)):

            def call(plan: Any = plan, qkv: Tensor = qkv, batch: Any = batch, cache: LayerCache = cache) -> None:
                prefill_attention(
                    qkv, batch.query_start, batch.chunks, batch.block_tables, batch.context_lens, cache, LLAMA,
                    out_of(qkv, LLAMA), plan=plan, pdl=gpu().pdl,
                )  # fmt: skip

            seconds = graph_seconds([call] * 2)
            print(f"  {'rule' if plan is rule else '    '} {name:13} {what:14} {seconds * 1e6:8.0f} µs "
                  f"{flops / seconds / 1e12:5.0f} TFLOP/s  {describe(plan)}", flush=True)  # fmt: skip
            records.append({"kind": "prefill", "kv": name, "name": what, "seconds": seconds, **asdict(plan)})
    return records


def time_store(name: str) -> list[Record]:
    records = []
    for num_tokens in (64, 8192):
        seconds = graph_seconds([store_case(num_tokens, FORMATS[name])[0] for _ in range(4)])
        print(f"  {name:13} {num_tokens:5} tokens {seconds * 1e6:8.2f} µs", flush=True)
        records.append({"kind": "store", "kv": name, "tokens": num_tokens, "seconds": seconds})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--kinds", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--bandwidth", type=float, default=4.55e12, help="bytes per second of the floor")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-alternatives", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    begin, records, failures = time.perf_counter(), [], []
    gpu()
    for name in options.kinds if not options.skip_checks else ():
        for check in (check_store, check_attention):
            try:
                check(FORMATS[name])
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{name}: {error}")
        print(f"checked {name} ({time.perf_counter() - begin:.0f} s)", *failures, flush=True)
    for name in options.kinds:
        records += time_store(name) + time_decode(name, options.bandwidth, not options.skip_alternatives)
        records += time_prefill(name)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    if options.json:
        device = torch.cuda.get_device_name()
        options.json.write_text(json.dumps({"device": device, "failures": failures, "records": records}, indent=1))
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
