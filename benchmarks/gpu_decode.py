"""Decode attention in CUDA C++ over codes, and 16-bit products of few rows: checked, and timed beside what was before.

    python benchmarks/gpu_decode.py [--json FILE] [--bandwidth 4.55e12] [--only codes steps products]

Every kind of cache, shape of heads, window and soft cap is held against Triton's kernel, twice, for the same bits.
Times are of CUDA graphs over as many caches as exceed the L2 cache; the floor is the bytes of codes and scales by
--bandwidth. "rule" is the variant that is chosen, others have as many warps and tiles in flight as they say.

"steps" are 32 layers of decodes of 16-bit caches as in the engine: of ragged contexts, in a pool of --pool-bytes,
right behind the kernel that rotates and stores, whose own time is taken off; with a sequence's blocks side by side,
and scattered over the pool. Some sequences are held against plain torch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_attention import COLD_BYTES, DEVICE, LLAMA, decode_calls, gpu, graph_seconds, out_of
from gpu_int4 import LAYERS, SHAPES, Matrix, make, microseconds, planned, plans_of, ring_layer
from gpu_kv import num_bytes_of, random_step

from turbolm.errors import EngineError
from turbolm.kv import KvKind
from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops.cuda.decode import Variant, decode_attention, variant_for
from turbolm.ops.cuda.decode_check import disagreement
from turbolm.ops.cuda.linear import gpu_of
from turbolm.ops.cuda.plan import DENSE
from turbolm.ops.triton.decode import decode_attention as triton_attention
from turbolm.ops.triton.decode import plan_decode
from turbolm.ops.triton.rotary import rotary_store

BLOCK_SIZE = 64
KINDS: tuple[KvKind, ...] = ("int8", "int4", "fp8")
STEPS = ((64, 4160), (64, 300), (256, 600), (8, 4096), (1, 32768))
RINGS = ((16, 2), (16, 3), (16, 6), (12, 2), (12, 4), (8, 4))  # warps and depth
SPECS = {
    "groups of 4": LLAMA,
    "groups of 8": AttentionSpec(64, 8, 128, 128, 128**-0.5),
    "no groups": AttentionSpec(8, 8, 128, 128, 128**-0.5),
    "heads of 64, groups of 3": AttentionSpec(9, 3, 64, 64, 0.125),
    "heads of 256": AttentionSpec(8, 4, 256, 256, 0.0625),
    "window": replace(LLAMA, window=100),
    "soft cap": replace(LLAMA, softcap=30.0),
}
LLAMA_2 = AttentionSpec(32, 32, 128, 128, 128**-0.5)
STEP_LAYERS = 32
LAYER_STEPS = (  # sequences and their mean context
    (LLAMA, 256, 264), (LLAMA, 64, 300), (LLAMA, 16, 4096), (LLAMA, 8, 4096), (LLAMA, 1, 300), (LLAMA, 1, 32768),
    (LLAMA_2, 256, 257), (LLAMA_2, 16, 257), (LLAMA_2, 1, 257),
)  # fmt: skip
PARTS = ("codes", "steps", "products")


def variant_of(spec: AttentionSpec, kind: KvKind, dtype: torch.dtype = torch.bfloat16) -> Variant | None:
    return variant_for(spec, BLOCK_SIZE, dtype, gpu_of(0).shared_per_cta, kind)


def check() -> bool:
    """Several at a time: most of it is compiling."""
    cases = [(name, spec, kind, torch.bfloat16) for name, spec in SPECS.items() for kind in KINDS]
    cases += [("groups of 4", LLAMA, kind, torch.float16) for kind in KINDS]
    cases = [case for case in cases if variant_of(*case[1:]) is not None]

    def compare(case: tuple[str, AttentionSpec, KvKind, torch.dtype]) -> bool:
        name, spec, kind, dtype = case
        reason = disagreement(decode_attention, spec, kind, BLOCK_SIZE, dtype, torch.device("cuda", 0))
        if reason is not None:
            print(f"  WRONG {name}, {kind}, {dtype}: {reason}", flush=True)
        return reason is None

    with ThreadPoolExecutor(12, initializer=torch.cuda.set_device, initargs=(0,)) as pool:
        right = all(list(pool.map(compare, cases)))
    print(f"  {len(cases)} small cases compared", flush=True)
    return right


def calls_of(step: Any, variant: Variant) -> list[Callable[[], None]]:
    qkv, batch, caches = step
    out = out_of(qkv, LLAMA)
    tables, contexts, counters = batch.block_tables, batch.context_lens, gpu().counters
    return [
        lambda cache=cache: decode_attention(qkv, tables, contexts, cache, LLAMA, out, counters, variant=variant)  # type: ignore[misc]
        for cache in caches * -(-4 // len(caches))
    ]


def same_as_triton(step: Any, kind: KvKind) -> bool:
    """At full size, twice."""
    qkv, batch, caches = step
    tables, contexts, counters = batch.block_tables, batch.context_lens, gpu().counters
    rule = plan_decode(LLAMA, caches[0], gpu().num_sms, gpu().shared_memory, batch.num_sequences, batch.max_context)
    wanted, *found = (out_of(qkv, LLAMA) for _ in range(3))
    triton_attention(
        qkv, tables, contexts, caches[0], LLAMA, wanted, plan=rule, counters=counters, max_context=batch.max_context,
        pdl=gpu().pdl,
    )  # fmt: skip
    for out in found:
        decode_attention(qkv, tables, contexts, caches[0], LLAMA, out, counters)
    error = (found[0].float() - wanted.float()).abs().max().item()
    right = error <= 0.02 * wanted.float().abs().max().item() and torch.equal(*found)
    if not right:
        print(f"  WRONG {kind}: {error:.3g} off, or not the same bits twice", flush=True)
    return right


def variants(kind: KvKind) -> Iterator[tuple[str, Variant]]:
    rule = variant_of(LLAMA, kind)
    assert rule is not None
    yield "rule", rule
    for warps, depth in RINGS:
        other = replace(rule, warps=warps, depth=depth)
        if other != rule and other.shared_bytes <= gpu_of(0).shared_per_cta:
            yield "    ", other


def time_decode(kind: KvKind, bandwidth: float) -> tuple[bool, list[dict[str, Any]]]:
    right, records = True, []
    for count, context in STEPS:
        num_bytes = num_bytes_of(LLAMA, (kind, kind), count * context)
        step = random_step([(1, context)] * count, (kind, kind), min(64, -(-COLD_BYTES // num_bytes)))
        right &= same_as_triton(step, kind)
        rule = plan_decode(LLAMA, step[2][0], gpu().num_sms, gpu().shared_memory, count, context)
        results = [("triton", graph_seconds(decode_calls(LLAMA, step, rule)))]
        chosen = list(variants(kind)) if (count, context) in STEPS[:2] else [next(variants(kind))]
        with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(0,)) as pool:
            for future in [pool.submit(calls_of(step, variant)[0]) for _, variant in chosen]:  # which compiles
                future.result()
        for label, variant in chosen:
            results.append((f"{label} {variant.warps} x {variant.depth}", graph_seconds(calls_of(step, variant))))
        for label, seconds in results:
            print(
                f"  {kind:5} {count:4} x {context:6} {label:12} {seconds * 1e6:8.1f} µs  "
                f"{num_bytes / bandwidth / seconds:4.0%} of the floor's speed", flush=True,
            )  # fmt: skip
            records.append({"kind": kind, "sequences": count, "context": context, "label": label, "seconds": seconds})
    return right, records


def plain_attention(
    q: torch.Tensor, cache: LayerCache, blocks: torch.Tensor, context: int, spec: AttentionSpec
) -> torch.Tensor:
    """One row [num_heads * head_dim] in float32."""
    k, v = (
        pool[blocks.long()]
        .transpose(0, 1)
        .flatten(1, 2)[:, :context]
        .float()
        .repeat_interleave(spec.num_heads // spec.num_kv_heads, 0)
        for pool in (cache.k, cache.v)
    )
    heads = q[: spec.q_width].view(spec.num_heads, 1, spec.head_dim).float()
    return ((heads @ k.transpose(1, 2) * spec.scale).softmax(2) @ v).flatten()


def time_step(spec: AttentionSpec, count: int, context: int, bandwidth: float, pool_bytes: float) -> tuple[bool, Any]:
    contexts = [round(context * (0.5 + i / (count - 1))) for i in range(count)] if count > 1 else [context]
    needed = [-(-c // BLOCK_SIZE) for c in contexts]
    token_bytes = 2 * 2 * spec.num_kv_heads * spec.head_dim
    num_blocks = int(pool_bytes) // (STEP_LAYERS * BLOCK_SIZE * token_bytes)
    pool = (num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    caches = [
        LayerCache(*(torch.empty(pool, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2)))
        for _ in range(STEP_LAYERS)
    ]
    qkv, rows = (torch.randn(count, spec.qkv_width, device=DEVICE).bfloat16() for _ in range(2))
    out, lengths = out_of(qkv, spec), torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    positions = lengths - 1
    counters = torch.zeros(count * spec.num_kv_heads, dtype=torch.int32, device=DEVICE)
    angles = 6 * torch.randn(max(contexts), 64, device=DEVICE)
    rope = RopeTable(angles.cos(), angles.sin())
    floor = sum(contexts) * token_bytes / bandwidth
    right, record = True, {"heads": spec.num_kv_heads, "sequences": count, "context": context, "floor": floor}
    for place, order in (("side by side", torch.arange(num_blocks)), ("scattered", torch.randperm(num_blocks))):
        ids = order[: sum(needed)].int().split(needed)
        tables = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True).to(DEVICE)
        slots = torch.tensor(
            [int(own[-1]) * BLOCK_SIZE + (c - 1) % BLOCK_SIZE for own, c in zip(ids, contexts, strict=True)],
            dtype=torch.int32, device=DEVICE,
        )  # fmt: skip

        def rotate(cache: LayerCache, slots: torch.Tensor = slots) -> None:
            rotary_store(qkv, positions, slots, cache, spec, rope, None, None, 1e-6, rows)

        def attend(cache: LayerCache, tables: torch.Tensor = tables) -> None:
            decode_attention(rows, tables, lengths, cache, spec, out, counters)

        rotate(caches[0])
        attend(caches[0])
        for row in {0, count // 2, count - 1}:
            expected = plain_attention(rows[row], caches[0], tables[row, : needed[row]], contexts[row], spec)
            right &= torch.allclose(out[row].float(), expected, atol=1e-2, rtol=2e-2)
        rotating = [lambda c=c, r=rotate: r(c) for c in caches]  # type: ignore[misc]
        attending = [lambda c=c, a=attend: a(c) for c in caches]  # type: ignore[misc]
        both = [call for pair in zip(rotating, attending, strict=True) for call in pair]
        rotation = graph_seconds(rotating)
        record |= {f"{place}, alone": graph_seconds(attending), f"{place}, behind": 2 * graph_seconds(both) - rotation}
        record["rotation"] = rotation
    return right, record


def time_steps(bandwidth: float, pool_bytes: float) -> tuple[bool, list[dict[str, Any]]]:
    all_right, records = True, []
    for spec, count, context in LAYER_STEPS:
        try:
            right, record = time_step(spec, count, context, bandwidth, pool_bytes)
        except (RuntimeError, EngineError) as error:
            print(f"  FAILED {count} x {context}: {error}", flush=True)
            all_right = False
            continue
        times = "  ".join(f"{name} {value * 1e6:.1f}" for name, value in record.items() if isinstance(value, float))
        verdict = "" if right else "  WRONG"
        print(f"  {spec.num_kv_heads:2} heads {count:4} x {context:6} µs: {times}{verdict}", flush=True)
        all_right &= right
        records.append({"kind": "step", **record})
    return all_right, records


def time_products() -> list[dict[str, Any]]:
    """A chain of Llama-2-7B's layers in 16 bits: an SM per CTA, all beside each other, against what was before."""
    layers: list[dict[str, Matrix]] = [
        {name: make(n, k, scale=k**-0.5) for name, (n, k) in SHAPES.items()} for _ in range(LAYERS // 4)
    ]
    records = []
    for t in (1, 4, 8, 16):
        x = {name: make(t, k) for name, (_, k) in SHAPES.items()}
        chosen = plans_of(t, planned, DENSE)
        shared = {name: replace(plan, alone=False) for name, plan in chosen.items()}
        row: dict[str, Any] = {"t": t}
        for label, plans, limit in (
            ("now", chosen, math.inf),
            ("before", shared, 64 << 20),
            ("apart", chosen, 0),
            ("large apart", chosen, 64 << 20),
        ):
            work = lambda x=x, p=plans, o=limit: [ring_layer(x, layer, p, o) for layer in layers] and None  # noqa: E731
            row[label] = microseconds(work, len(layers)) * LAYERS / 1e3
        print("  products", "  ".join(f"{label} {value:.3f}" for label, value in row.items()), "ms", flush=True)
        records.append(row)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bandwidth", type=float, default=4.55e12, help="bytes per second")
    parser.add_argument("--pool-bytes", type=float, default=60e9, help="of all layers of the steps")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    start = time.monotonic()
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}")
    right, records = True, []
    if "steps" in options.only:
        right, records = time_steps(options.bandwidth, options.pool_bytes)
    if "codes" in options.only:
        right &= check()
    for kind in KINDS if "codes" in options.only else ():
        is_right, rows = time_decode(kind, options.bandwidth)
        right &= is_right
        records += rows
    if "products" in options.only:
        records += time_products()
    print(f"{'all right' if right else 'WRONG RESULTS'}, {time.monotonic() - start:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1))
    raise SystemExit(not right)


if __name__ == "__main__":
    main()
