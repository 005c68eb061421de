"""Native CPU ops against the plain-torch reference, and their promise of batch invariance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.ops import AttentionSpec, LayerCache, RopeTable
from turbolm.ops.cpu import library
from turbolm.ops.cpu.ops import CpuOps, _log_once
from turbolm.ops.reference import ReferenceOps
from turbolm.types import Batch

ISAS = [name for name in ("generic", "neon", "avx2", "avx512") if library.select_isa(name)]
assert library.select_isa("")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the last two: rounding on store
REFERENCE = ReferenceOps(torch.device("cpu"), torch.float32)
OPS = {threads: CpuOps(threads=threads) for threads in (1, 2, 3)}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert library.select_isa(request.param)
    yield request.param
    assert library.select_isa("")


@dataclass
class Pool:
    """Blocks of a KV cache, handed out in random order, and the sequences in them."""

    cache: LayerCache
    free: list[int]
    tables: dict[int, list[int]]

    @classmethod
    def make(cls, spec: AttentionSpec, block_size: int, dtype: torch.dtype, num_blocks: int = 64) -> Pool:
        shape = (num_blocks, spec.num_kv_heads, block_size)
        # NaN in memory that was never written must not reach any result.
        k, v = (torch.full((*shape, dim), torch.nan, dtype=dtype) for dim in (spec.head_dim, spec.v_head_dim))
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        return cls(LayerCache(k, v), order, {})

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
    return AttentionSpec(heads, kv_heads, dim, v_dim or dim, dim**-0.5, **options)  # type: ignore[arg-type]


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
    pool, other = (Pool.make(spec, 16, torch.float32) for _ in range(2))
    batch = pool.batch([(0, 0, 5), (1, 17, 1)])
    other.batch([(0, 0, 5), (1, 17, 1)])
    q_norm, k_norm = (random(64, seed=1), random(64, seed=2)) if has_norm else (None, None)
    qkv = random(6, spec.qkv_width)
    rope = rope_table(rotary_dim, interleaved)
    result = OPS[2].rotary_store(qkv.clone(), batch, pool.cache, spec, rope, q_norm, k_norm, 1e-5)
    expected = REFERENCE.rotary_store(qkv.clone(), batch, other.cache, spec, rope, q_norm, k_norm, 1e-5)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize(
    "spec",
    [
        spec_of(9, 3, 64),
        spec_of(4, 4, 32),
        spec_of(16, 1, 128),
        spec_of(6, 2, 80, 40, softcap=5.0),
        spec_of(2, 1, 256, window=20),
        spec_of(14, 2, 64, window=150),
    ],
    ids=str,
)
def test_attention(isa: str, dtype: torch.dtype, block_size: int, spec: AttentionSpec) -> None:
    mine, other = (Pool.make(spec, block_size, dtype, num_blocks=1024 // block_size) for _ in range(2))
    rope = rope_table(32)
    steps = [
        [(0, 0, 3), (1, 0, 150), (2, 0, 1)],
        [(0, 3, 1), (1, 150, 61), (2, 1, 1), (3, 0, 20)],
        [(0, 4, 1), (1, 211, 1), (2, 2, 1), (3, 20, 1)],
        [(3, 21, 2), (1, 212, 60)],
    ]
    for number, parts in enumerate(steps):
        batch = mine.batch(parts)
        other.batch(parts)
        qkv = random(batch.num_tokens, spec.qkv_width, seed=number)
        result = attend(OPS[1 + number % 2], mine, spec, batch, qkv, rope)
        expected = attend(REFERENCE, other, spec, batch, qkv, rope)
        torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


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


def attend_in_chunks(spec: AttentionSpec, qkv: Tensor, sizes: list[int], threads: int, crowd: int) -> Tensor:
    """A sequence's attention, computed chunk by chunk beside `crowd` other sequences."""
    pool = Pool.make(spec, 16, torch.float16, num_blocks=256)
    results = []
    for number, (cached, new) in enumerate(chunks_of(qkv.shape[0], sizes)):
        others = [(1 + i, 7 * number, 7) for i in range(crowd)]
        batch = pool.batch([*others[:1], (0, cached, new), *others[1:]])
        first = int(batch.query_start[min(crowd, 1)])
        rows = random(batch.num_tokens, spec.qkv_width, seed=number)
        rows[first : first + new] = qkv[cached : cached + new]
        results.append(attend(OPS[threads], pool, spec, batch, rows, rope_table(64))[first : first + new])
    return torch.cat(results)


@pytest.mark.parametrize(
    "spec", [spec_of(9, 3, 64), spec_of(4, 1, 80, 72, window=100), spec_of(64, 1, 64, softcap=20.0)], ids=str
)
def test_attention_is_batch_invariant(isa: str, spec: AttentionSpec) -> None:
    """However the prompt is cut, whatever else is in the batch, and on any number of threads, a
    token's result is the same bit by bit."""
    qkv = random(300, spec.qkv_width, seed=7)
    whole = attend_in_chunks(spec, qkv, [300], threads=1, crowd=0)
    for sizes, threads, crowd in ([300], 3, 0), ([128, 1], 2, 2), ([290, 1], 2, 0), ([37, 3, 1, 90], 3, 3):
        assert torch.equal(attend_in_chunks(spec, qkv, sizes, threads, crowd), whole), (sizes, threads, crowd)


def test_split_context_is_exact() -> None:
    """A long context is shared by the threads; the result is that of one."""
    spec = spec_of(4, 1, 64)
    qkv = random(1000, spec.qkv_width)
    results = [attend_in_chunks(spec, qkv, [996, 1], threads, 0) for threads in (1, 2, 3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_instruction_sets_agree() -> None:
    """Those with fused multiply-add compute the same bits."""
    spec = spec_of(4, 2, 64)
    qkv = random(100, spec.qkv_width)
    results = []
    for name in ISAS:
        assert library.select_isa(name)
        if name != "generic":
            results.append(attend_in_chunks(spec, qkv, [64, 1], 2, 1))
    assert library.select_isa("")
    assert all(torch.equal(result, results[0]) for result in results)


def test_foreign_cache_dtype_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """A cache that the kernels don't know works on the reference, and the log says so once."""
    _log_once.cache_clear()
    spec = spec_of(4, 2, 64)
    pool, other = (Pool.make(spec, 16, torch.float64) for _ in range(2))
    for _ in range(2):
        batch = pool.batch([(0, 0, 5)])
        other.batch([(0, 0, 5)])
        qkv = random(5, spec.qkv_width)
        expected = attend(REFERENCE, other, spec, batch, qkv, None)
        torch.testing.assert_close(attend(OPS[1], pool, spec, batch, qkv, None), expected)
    assert [r.message for r in caplog.records if "float64" in r.message] == [
        "no native kernels for a KV cache of float64 in blocks of 16: attention runs on plain PyTorch, "
        "several times slower"
    ]
