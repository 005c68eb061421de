"""Native CPU ops against the plain-torch reference, and their promise of batch invariance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm import fallbacks
from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops.cpu import library
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.reference import ReferenceOps
from turbolm.types import Batch

ISAS = [name for name in ("generic", "neon", "avx2", "avx512") if library.select_isa(name)]
assert library.select_isa("")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
TOLERANCE = 2e-5  # what is stored is the same: a code or a float16 beside the right one would show
REFERENCE = ReferenceOps(torch.device("cpu"), torch.float32)
OPS = {threads: CpuOps(threads=threads) for threads in (1, 2, 3)}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert library.select_isa(request.param)
    yield request.param
    assert library.select_isa("")


def memory(shape: tuple[int, ...], dim: int, kind: str) -> tuple[Tensor, Tensor | None]:
    """Of a kind's floats, or codes and scales, never written: NaN in it must not reach any result."""
    if kind in DTYPES:
        return torch.full((*shape, dim), torch.nan).to(DTYPES[kind]), None
    codes = torch.full((*shape, dim // 2 if kind == "int4" else dim), 0xEE, dtype=torch.uint8)
    return codes, torch.full((*shape, 2), torch.nan, dtype=torch.float16)


@dataclass
class Pool:
    """Blocks of a KV cache, handed out in random order, and the sequences in them."""

    cache: LayerCache
    free: list[int]
    tables: dict[int, list[int]]

    @classmethod
    def make(
        cls, spec: AttentionSpec, block_size: int, kind_k: str, kind_v: str | None = None, num_blocks: int = 64
    ) -> Pool:
        shape = (num_blocks, spec.num_kv_heads, block_size)
        k, k_scales = memory(shape, spec.head_dim, kind_k)
        v, v_scales = memory(shape, spec.v_head_dim, kind_v or kind_k)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        return cls(LayerCache(k, v, k_scales, v_scales, kind_k, kind_v or kind_k), order, {})  # type: ignore[arg-type]

    def batch(self, parts: list[tuple[int, int, int]]) -> Batch:
        """A step of (sequence, cached tokens, new tokens)."""
        size = self.cache.block_size
        positions: list[int] = []
        slots: list[int] = []
        for sequence, cached, new in parts:
            table = self.tables.setdefault(sequence, [])
            while len(table) * size < cached + new:
                table.append(self.free.pop())
            positions += range(cached, cached + new)
            slots += [table[p // size] * size + p % size for p in range(cached, cached + new)]
        longest = max(len(self.tables[sequence]) for sequence, _, _ in parts)
        tables = [self.tables[sequence] + [0] * (longest - len(self.tables[sequence])) for sequence, _, _ in parts]

        def ints(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        return Batch(
            token_ids=ints([0] * len(positions)),
            positions=ints(positions),
            slots=ints(slots),
            query_start=ints([0, *itertools.accumulate(new for _, _, new in parts)]),
            context_lens=ints([cached + new for _, cached, new in parts]),
            block_tables=ints(tables),
            logit_rows=ints([len(positions) - 1]),
            num_tokens=len(positions),
            num_sequences=len(parts),
            max_query=max(new for _, _, new in parts),
            max_context=max(cached + new for _, cached, new in parts),
        )


def rope_table(dim: int, interleaved: bool = False) -> RopeTable:
    angles = torch.outer(torch.arange(1024.0), 100.0 ** -(torch.arange(0.0, dim, 2) / dim))
    return RopeTable(angles.cos(), angles.sin(), interleaved)


def spec_of(heads: int, kv_heads: int, dim: int, v_dim: int | None = None, **options: float) -> AttentionSpec:
    options = {"scale": dim**-0.5, **options}
    return AttentionSpec(heads, kv_heads, dim, v_dim or dim, **options)  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(
    ops: CpuOps | ReferenceOps, pool: Pool, spec: AttentionSpec, batch: Batch, qkv: Tensor, rope: RopeTable | None
) -> Tensor:
    stored = ops.rotary_store(qkv.clone(), batch, pool.cache, spec, rope, None, None, 1e-5)
    return ops.attention(stored, batch, pool.cache, spec)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 700), threads=st.sampled_from(list(OPS)), seed=st.integers(0, 99))
def test_norms_and_sums(rows: int, width: int, threads: int, seed: int) -> None:
    ops, x, residual, weight = OPS[threads], random(rows, width, seed=seed), random(rows, width), random(width)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    expected, expected_residual = REFERENCE.add_rms_norm(x, residual.clone(), weight, 1e-5)
    mine = residual.clone()
    result, result_residual = ops.add_rms_norm(x, mine, weight, 1e-5)
    torch.testing.assert_close(result, expected)
    assert torch.equal(result_residual, expected_residual) and result_residual is mine
    assert ops.add(x, mine) is mine
    assert torch.equal(mine, expected_residual + x)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (1, 7), (5, 100), (3, 64)])
def test_activation(isa: str, activation: str, rows: int, width: int) -> None:
    x = random(rows, 2 * width) * 4
    x[0, :3] = torch.tensor([-200.0, 200.0, 0.0])[: min(3, width)]
    expected = REFERENCE.activate_multiply(x.double(), activation).float()  # type: ignore[arg-type]
    for ops in OPS.values():
        torch.testing.assert_close(ops.activate_multiply(x, activation), expected, atol=1e-6, rtol=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 32, 12])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotary(isa: str, interleaved: bool, rotary_dim: int, has_norm: bool) -> None:
    spec = spec_of(4, 2, 64)
    pool, other = (Pool.make(spec, 16, "float32") for _ in range(2))
    batch = pool.batch([(0, 0, 5), (1, 17, 1)])
    other.batch([(0, 0, 5), (1, 17, 1)])
    q_norm, k_norm = (random(64, seed=1), random(64, seed=2)) if has_norm else (None, None)
    qkv = random(6, spec.qkv_width)
    rope = rope_table(rotary_dim, interleaved)
    result = OPS[2].rotary_store(qkv.clone(), batch, pool.cache, spec, rope, q_norm, k_norm, 1e-5)
    expected = REFERENCE.rotary_store(qkv.clone(), batch, other.cache, spec, rope, q_norm, k_norm, 1e-5)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-6)


STEPS = [
    [(0, 0, 3), (1, 0, 150), (2, 0, 1)],
    [(0, 3, 1), (1, 150, 61), (2, 1, 1), (3, 0, 20)],
    [(0, 4, 1), (1, 211, 1), (2, 2, 1), (3, 20, 1)],
    [(3, 21, 2), (1, 212, 60)],
]


def check_attention(spec: AttentionSpec, block_size: int, kinds: tuple[str, str]) -> None:
    """Prompts, chunks and decodes of several sequences against the reference."""
    mine, other = (Pool.make(spec, block_size, *kinds, num_blocks=1024 // block_size) for _ in range(2))
    rope = rope_table(32)
    for number, parts in enumerate(STEPS):
        batch = mine.batch(parts)
        other.batch(parts)
        qkv = random(batch.num_tokens, spec.qkv_width, seed=number)
        result = attend(OPS[1 + number % 2], mine, spec, batch, qkv, rope)
        expected = attend(REFERENCE, other, spec, batch, qkv, rope)
        torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)


KINDS = ["float32", "float16", "bfloat16", "int8", "int4", "fp8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("block_size", "spec"),
    [
        (8, spec_of(9, 3, 64)),
        (32, spec_of(4, 4, 32)),
        (64, spec_of(16, 1, 128)),
        (16, spec_of(6, 2, 80, 48, softcap=5.0)),
        (8, spec_of(2, 1, 256, window=20)),
        (16, spec_of(14, 2, 64, window=150)),
    ],
    ids=str,
)
def test_attention(isa: str, kind: str, block_size: int, spec: AttentionSpec) -> None:
    check_attention(spec, block_size, (kind, kind))


@pytest.mark.parametrize(
    "kinds", [("int8", "int4"), ("int4", "fp8"), ("float16", "int8"), ("fp8", "bfloat16")], ids=str
)
def test_keys_and_values_of_different_kinds(isa: str, kinds: tuple[str, str]) -> None:
    check_attention(spec_of(8, 2, 96, 64), 32, kinds)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantization_of_large_small_and_constant_heads(isa: str, kind: str) -> None:
    """Codes clip, e4m3 saturates at 448 and has subnormals; a head of one value has scale 0."""
    spec = spec_of(1, 1, 32)
    sizes = torch.logspace(-9, 9, 40, base=2)[:, None]
    qkv = random(40, spec.qkv_width, seed=3) * sizes
    qkv[5, 32:] = 2.5
    qkv[6, 32:] = 0.0
    mine, other = (Pool.make(spec, 16, kind) for _ in range(2))
    batch = mine.batch([(sequence, 0, 1) for sequence in range(40)])  # attention gives back each token's value
    other.batch([(sequence, 0, 1) for sequence in range(40)])
    result = attend(OPS[1], mine, spec, batch, qkv, None)
    expected = attend(REFERENCE, other, spec, batch, qkv, None)
    torch.testing.assert_close(result / sizes, expected / sizes, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 40], ids=["lone", "prefill"])
def test_static_ranges_clip_what_is_beyond_them(isa: str, length: int) -> None:
    spec, ranges = spec_of(4, 2, 32), torch.tensor([[0.01, -1.0], [0.02, -0.5]]).half()
    mine, other = (Pool.make(spec, 16, "int8") for _ in range(2))
    for pool in (mine, other):
        pool.cache = replace(pool.cache, k_range=ranges, v_range=ranges.flip(0).contiguous())
    batch = mine.batch([(0, 0, length)])
    other.batch([(0, 0, length)])
    qkv = 2 * random(length, spec.qkv_width, seed=5)
    result = attend(OPS[1], mine, spec, batch, qkv, rope_table(32))
    torch.testing.assert_close(result, attend(REFERENCE, other, spec, batch, qkv, rope_table(32)), atol=1e-5, rtol=1e-5)
    values = qkv[0, -64:].view(2, 32)  # the first token sees itself alone
    exact = torch.stack([values[0].clamp(-0.5, -0.5 + 0.02 * 255), values[1].clamp(-1.0, -1.0 + 0.01 * 255)])
    torch.testing.assert_close(result[0].view(2, 2, 32), exact[:, None].expand(2, 2, 32), atol=0.02, rtol=0)


def chunks_of(total: int, sizes: list[int]) -> list[tuple[int, int]]:
    """(cached, new) of the steps that compute `total` tokens in turns of `sizes`."""
    steps, done = [], 0
    for size in itertools.cycle(sizes):
        if done == total:
            return steps
        new = min(size, total - done)
        steps.append((done, new))
        done += new
    raise AssertionError


def attend_in_chunks(
    spec: AttentionSpec, qkv: Tensor, sizes: list[int], threads: int, crowd: int, kind: str = "float16"
) -> Tensor:
    """A sequence's attention, computed chunk by chunk beside `crowd` other sequences."""
    pool = Pool.make(spec, 16, kind, num_blocks=256)
    results = []
    for number, (cached, new) in enumerate(chunks_of(qkv.shape[0], sizes)):
        others = [(1 + i, 7 * number, 7) for i in range(crowd)]
        batch = pool.batch([*others[:1], (0, cached, new), *others[1:]])
        first = int(batch.query_start[min(crowd, 1)])
        rows = random(batch.num_tokens, spec.qkv_width, seed=number)
        rows[first : first + new] = qkv[cached : cached + new]
        results.append(attend(OPS[threads], pool, spec, batch, rows, rope_table(32))[first : first + new])
    return torch.cat(results)


@pytest.mark.parametrize("kind", ["float16", "int8", "int4", "fp8"])
@pytest.mark.parametrize(
    "spec", [spec_of(9, 3, 64), spec_of(4, 1, 80, 72, window=100), spec_of(64, 1, 32, softcap=20.0)], ids=str
)
def test_attention_is_batch_invariant(isa: str, spec: AttentionSpec, kind: str) -> None:
    """However the prompt is cut, whatever else is in the batch, and on any number of threads, a
    token's result is the same bit by bit."""
    qkv = random(300, spec.qkv_width, seed=7)
    whole = attend_in_chunks(spec, qkv, [300], threads=1, crowd=0, kind=kind)
    for sizes, threads, crowd in ([300], 3, 0), ([128, 1], 2, 2), ([290, 1], 2, 0), ([37, 3, 1, 90], 3, 3):
        assert torch.equal(attend_in_chunks(spec, qkv, sizes, threads, crowd, kind), whole), (sizes, threads, crowd)


def test_split_context_is_exact() -> None:
    """A long context is shared by the threads; the result is that of one."""
    spec = spec_of(4, 1, 64)
    qkv = random(1000, spec.qkv_width)
    results = [attend_in_chunks(spec, qkv, [996, 1], threads, 0) for threads in (1, 2, 3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_agree(kind: str) -> None:
    """Those with fused multiply-add compute the same bits."""
    spec = spec_of(4, 2, 64)
    qkv = random(100, spec.qkv_width)
    results = []
    for name in ISAS:
        assert library.select_isa(name)
        if name != "generic":
            results.append(attend_in_chunks(spec, qkv, [64, 1], 2, 1, kind))
    assert library.select_isa("")
    assert all(torch.equal(result, results[0]) for result in results)


def test_foreign_cache_falls_back(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that the kernels don't know works on the reference, and the log says so once."""
    monkeypatch.setattr(fallbacks, "_told", set())
    spec = spec_of(4, 2, 64)
    pool, other = (Pool.make(spec, 4, "int8", "float32") for _ in range(2))
    for _ in range(2):
        batch = pool.batch([(0, 0, 5)])
        other.batch([(0, 0, 5)])
        qkv = random(5, spec.qkv_width)
        expected = attend(REFERENCE, other, spec, batch, qkv, None)
        torch.testing.assert_close(attend(OPS[1], pool, spec, batch, qkv, None), expected)
    assert [r.message for r in caplog.records if "float32" in r.message] == [
        "no native kernels for a KV cache of int8 keys and float32 values in blocks of 4: attention runs on plain "
        "PyTorch, several times slower"
    ]
