"""Paged attention kernels against the plain-torch reference, in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.cache.spec import CacheSpec
from turbolm.kv import KvFormat, KvKind, KvShape
from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.reference import ReferenceOps, dequantize_heads, quantize_heads
from turbolm.ops.triton import attention as dispatch
from turbolm.ops.triton.attention import attention
from turbolm.ops.triton.decode import DecodePlan, decode_attention, plan_decode
from turbolm.ops.triton.prefill import MULTIPLE, PrefillPlan, plan_prefill, prefill_attention, skipped_rows
from turbolm.ops.triton.tiles import pair_tokens
from turbolm.types import Batch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
REFERENCE = ReferenceOps(torch.device(DEVICE), torch.float32)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """A step whose K and V are in the cache already; unused slots and unused blocks hold NaN."""

    qkv: Tensor
    batch: Batch
    plain: LayerCache  # as the reference keeps it
    spec: AttentionSpec

    @property
    def cache(self) -> LayerCache:
        return pair_tokens(self.plain)

    def expected(self) -> Tensor:
        """[t, heads * v_head_dim] float32; zeros for sequences without context."""
        plain = self.plain
        cache = LayerCache(
            dequantize_heads(plain.k, plain.k_scales, plain.kind_k),
            dequantize_heads(plain.v, plain.v_scales, plain.kind_v),
        )
        out = torch.zeros(self.qkv.shape[0], self.spec.num_heads * self.spec.v_head_dim, device=DEVICE)
        starts = self.batch.query_start.tolist()
        for i, (first, last) in enumerate(itertools.pairwise(starts)):
            if not self.batch.context_lens[i]:
                continue
            one = replace(
                self.batch,
                query_start=torch.tensor([0, last - first]),
                context_lens=self.batch.context_lens[i : i + 1],
                block_tables=self.batch.block_tables[i : i + 1],
                max_query=last - first,
            )
            out[first:last] = REFERENCE.attention(self.qkv[first:last].float(), one, cache, self.spec)
        return out

    def empty_out(self) -> Tensor:
        width = self.spec.num_heads * self.spec.v_head_dim
        return torch.full((self.qkv.shape[0], width), torch.nan, dtype=self.qkv.dtype, device=DEVICE)

    def check(self, out: Tensor) -> None:
        # Beside codes, queries and weights are float16.
        is_coded = self.plain.k.itemsize == 1 or self.plain.v.itemsize == 1
        tolerance = max(TOLERANCE[self.qkv.dtype], TOLERANCE[torch.float16] if is_coded else 0)
        torch.testing.assert_close(out.float(), self.expected(), atol=tolerance, rtol=tolerance)


def make_case(
    spec: AttentionSpec, sequences: list[tuple[int, int]], block_size: int, dtype: torch.dtype = torch.float32,
    seed: int = 0, kinds: tuple[KvKind | None, KvKind | None] = (None, None),
) -> Case:  # fmt: skip
    """`sequences`: new tokens and context with them, decodes first; context 0: padding (one row). `kinds` of k and
    v; None: numbers in `dtype`."""
    random = torch.Generator().manual_seed(seed)
    counts, contexts = [new for new, _ in sequences], [context for _, context in sequences]
    needed = [-(-context // block_size) for context in contexts]
    order = (torch.randperm(sum(needed), generator=random) + 1).tolist()
    tables = torch.full((len(sequences), max(*needed, 1) + 1), 1 << 28, dtype=torch.int32)  # far outside the pool
    pools = [
        torch.full((sum(needed) + 1, spec.num_kv_heads, block_size, dim), torch.nan, dtype=dtype)
        for dim in (spec.head_dim, spec.v_head_dim)
    ]
    for i, (blocks, context) in enumerate(zip(needed, contexts, strict=True)):
        for j in range(blocks):
            tables[i, j] = order.pop()
            used = min(block_size, context - j * block_size)
            for pool in pools:
                shape = (pool.shape[1], used, pool.shape[3])
                pool[tables[i, j], :, :used] = torch.randn(shape, generator=random).to(dtype)
    starts = [0, *itertools.accumulate(counts)]
    num_decodes = next((i for i, new in enumerate(counts) if new > 1), len(counts))
    ints = torch.zeros(starts[-1], dtype=torch.int32, device=DEVICE)
    batch = Batch(
        ints, ints, ints, *(torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (starts, contexts)),
        tables.to(DEVICE), ints, starts[-1], len(sequences), max(counts), max(*contexts, 1), num_decodes,
        tuple(zip(starts[num_decodes:], counts[num_decodes:], contexts[num_decodes:], strict=False)),
    )  # fmt: skip
    qkv = torch.randn(starts[-1], spec.qkv_width, generator=random).to(dtype)
    return Case(qkv.to(DEVICE), batch, make_cache(pools, kinds), spec)


def make_cache(pools: list[Tensor], kinds: tuple[KvKind | None, KvKind | None]) -> LayerCache:
    """The pools in kinds; unused slots have scales of NaN and codes of any kind."""
    made: list[tuple[Tensor, Tensor | None, KvKind]] = []
    for pool, kind in zip(pools, kinds, strict=True):
        kind = kind or str(pool.dtype).removeprefix("torch.")  # type: ignore[assignment]
        used = pool.nan_to_num(0.5) if kind == "fp8" else pool
        codes, scales = quantize_heads(used, kind)
        made.append((codes.to(DEVICE), None if scales is None else scales.to(DEVICE), kind))
    (k, k_scales, kind_k), (v, v_scales, kind_v) = made
    return LayerCache(k, v, k_scales, v_scales, kind_k, kind_v)


def spec_of(heads: int, kv_heads: int, dim: int, v_dim: int | None = None, **options: float) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, v_dim or dim, 1.5 * dim**-0.5, **options)  # type: ignore[arg-type]


def run_decode(case: Case, plan: DecodePlan, counters: Tensor | None = None) -> Tensor:
    counters = torch.zeros(256, dtype=torch.int32, device=DEVICE) if counters is None else counters
    out, batch = case.empty_out(), case.batch
    several = {} if batch.max_query == 1 else {"query_start": batch.query_start, "max_query": batch.max_query}
    decode_attention(
        case.qkv, batch.block_tables, batch.context_lens, case.cache, case.spec, out, plan=plan, counters=counters,
        max_context=batch.max_context, **several,
    )  # fmt: skip
    assert not counters.any(), "counters are zero between launches"
    return out


def run_prefill(case: Case, plan: PrefillPlan, skip: int = 0) -> Tensor:
    out, batch = case.empty_out(), case.batch
    first = batch.num_decodes
    prefill_attention(
        case.qkv, batch.query_start[first:], batch.chunks, batch.block_tables[first:], batch.context_lens[first:],
        case.cache, case.spec, out, plan=plan, skip=skip,
    )  # fmt: skip
    return out


specs = st.builds(
    lambda kv_heads, group, dim, v_dim, window, softcap: spec_of(
        kv_heads * group, kv_heads, dim, v_dim, window=window, softcap=softcap
    ),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4, 8]),
    dim=st.sampled_from([8, 16, 24]),
    v_dim=st.sampled_from([None, 16, 8]),
    window=st.sampled_from([None, None, 1, 5, 20]),
    softcap=st.sampled_from([None, None, 2.0]),
)
one_decode = st.tuples(st.just(1), st.integers(0, 70))
one_chunk = st.tuples(st.integers(2, 20), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=6, deadline=None)
@given(spec=specs, sequences=st.lists(one_decode, min_size=1, max_size=4), block_size=st.sampled_from([8, 16, 32, 64]),
       programs=st.integers(1, 12), apart=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_decode(spec: AttentionSpec, sequences: list[tuple[int, int]], block_size: int, programs: int, apart: bool,
                seed: int) -> None:  # fmt: skip
    case = make_case(spec, sequences, block_size, seed=seed)
    case.check(run_decode(case, DecodePlan(32, programs, 4, 3, apart)))


@settings(max_examples=5, deadline=None)
@given(spec=specs, sequences=st.lists(one_chunk, min_size=1, max_size=2), block_size=st.sampled_from([8, 16, 32, 64]),
       rows=st.sampled_from([16, 32]), seed=st.integers(0, 99))  # fmt: skip
def test_prefill(spec: AttentionSpec, sequences: list[tuple[int, int]], block_size: int, rows: int,
                 seed: int) -> None:  # fmt: skip
    case = make_case(spec, sequences, block_size, seed=seed)
    case.check(run_prefill(case, PrefillPlan(rows, 16, 4, 2)))


@settings(max_examples=6, deadline=None)
@given(
    spec=specs,
    decodes=st.lists(one_decode, max_size=3),
    chunks=st.lists(one_chunk, max_size=2),
    block_size=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_a_mixed_step(spec: AttentionSpec, decodes: list[tuple[int, int]], chunks: list[tuple[int, int]],
                      block_size: int, seed: int) -> None:  # fmt: skip
    case = make_case(spec, [*decodes, *chunks] or [(1, 3)], block_size, seed=seed)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, case.spec, out)
    case.check(out)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("programs", [1, 7])
def test_drafts_are_checked_by_the_decode_kernel(window: int | None, programs: int) -> None:
    spec = spec_of(6, 2, 16, window=window)
    case = make_case(spec, [(3, 40), (2, 2), (1, 33)], 16)
    case.check(run_decode(case, DecodePlan(16, programs, 4, 3)))


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
def test_head_sizes(dim: int, v_dim: int) -> None:
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter multiplies bfloat16 wrongly
    case = make_case(spec_of(4, 1, dim, v_dim), [(1, 70), (20, 75)], 16, dtype)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, case.spec, out)
    case.check(out)


@pytest.mark.parametrize("programs", [2, 9])
def test_any_cut_of_the_work_gives_the_same_answer(programs: int) -> None:
    """Pairs that are whole, cut once, and cut many times; the counters are ready for the next layer."""
    case = make_case(spec_of(4, 2, 16), [(1, 70), (1, 1), (1, 0), (1, 17)], 16)
    counters = torch.zeros(256, dtype=torch.int32, device=DEVICE)
    first = run_decode(case, DecodePlan(16, programs, 4, 3), counters)
    case.check(first)
    assert torch.equal(first, run_decode(case, DecodePlan(16, programs, 4, 3), counters))


def test_a_split_of_many_parts() -> None:
    """More programs on one pair than are put together at a time."""
    case = make_case(spec_of(2, 1, 16), [(1, 300)], 16)
    case.check(run_decode(case, DecodePlan(16, 64, 4, 3)))


def test_padding_is_zero_and_its_block_table_is_not_read() -> None:
    case = make_case(spec_of(4, 2, 16), [(1, 0), (1, 20), (1, 0), (1, 0)], 16)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, case.spec, out)
    assert not out[[0, 2, 3]].any()
    case.check(out)


def test_rows_may_be_parts_of_wider_ones() -> None:
    case = make_case(spec_of(4, 2, 16), [(1, 30), (30, 45)], 16)
    wide = torch.full((case.qkv.shape[0], 200), torch.nan, device=DEVICE)
    attention(case.qkv, case.batch, case.cache, case.spec, wide[:, 64:128])
    case.check(wide[:, 64:128])
    assert wide[:, :64].isnan().all() and wide[:, 128:].isnan().all()


def test_what_is_skipped_is_left_alone() -> None:
    """Of a long fresh chunk the kernel computes only the rows past the last multiple."""
    case = make_case(spec_of(2, 1, 16), [(1, 9), (270, 270), (20, 20), (260, 265)], 16)
    out = run_prefill(case, PrefillPlan(64, 64, 4, 2), skip=256)
    assert out[1 : 1 + 256].isnan().all()
    expected = case.expected()
    torch.testing.assert_close(out[1 + 256 :], expected[1 + 256 :], atol=2e-5, rtol=2e-5)


def test_cudnn_and_the_kernel_together_cover_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the library's part is played by PyTorch's own attention: same views, same rows."""

    def attend(qkv: Tensor, spec: AttentionSpec, out: Tensor) -> None:
        q, k, v = dispatch.heads_of(qkv, spec)
        result = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True
        )
        out.unflatten(1, (-1, spec.head_dim)).copy_(result[0].transpose(0, 1))

    spec = spec_of(2, 1, 16)
    case = make_case(spec, [(1, 9), (20, 30), (270, 270)], 16)
    case.plain.k[case.batch.block_tables[2, :17].long()] = _paged(case, 1, 270)
    case.plain.v[case.batch.block_tables[2, :17].long()] = _paged(case, 2, 270)
    monkeypatch.setattr(dispatch, "CUDNN_ROWS", 256)
    monkeypatch.setattr(dispatch, "_fits_cudnn", lambda *_: True)
    monkeypatch.setattr(dispatch, "_attend_cudnn", attend)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, spec, out)
    case.check(out)

    def refuse(*_: object) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr(dispatch, "_attend_cudnn", refuse)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, spec, out)
    case.check(out)


def _paged(case: Case, part: int, count: int) -> Tensor:
    """k (1) or v (2) of the last `count` rows of a one-kv-head qkv as blocks [b, 1, 16, d]."""
    rows = dispatch.heads_of(case.qkv[-count:], case.spec)[part][0, 0]
    padded = torch.full((-(-count // 16) * 16, rows.shape[1]), torch.nan, device=DEVICE)
    padded[:count] = rows
    return padded.view(-1, 1, 16, rows.shape[1])


@given(rows=st.integers(1, 3000), cached=st.sampled_from([0, 1, 500]), skip=st.sampled_from([0, 256, 512]))
def test_only_long_fresh_chunks_are_skipped(rows: int, cached: int, skip: int) -> None:
    skipped = skipped_rows(rows, rows + cached, skip)
    assert skipped % MULTIPLE == 0 and rows - skipped >= 0
    assert (skipped > 0) == (cached == 0 and 0 < skip <= rows)
    assert skipped == 0 or rows - skipped < MULTIPLE


@given(
    spec=specs,
    shared=st.sampled_from([99, 163, 227]),
    longest=st.integers(1, 9000),
    size=st.sampled_from([2, 4]),
    kinds=st.sampled_from([("float16", "float16"), ("int8", "int8"), ("int4", "int4"), ("float16", "fp8")]),
)
def test_plans_fit(spec: AttentionSpec, shared: int, longest: int, size: int, kinds: tuple[KvKind, KvKind]) -> None:
    spec = replace(spec, head_dim=8 * spec.head_dim, v_head_dim=8 * spec.v_head_dim)
    shape = KvShape(spec.num_kv_heads, spec.head_dim, spec.v_head_dim)
    (cache,) = CacheSpec((shape,), KvFormat(*kinds, "float16")).allocate(1, 16, torch.device("cpu"))
    group = spec.num_heads // spec.num_kv_heads
    plan = plan_prefill(spec, size, shared << 10, longest)
    assert plan.rows >= group and plan.rows % 16 == 0 and plan.num_stages >= 1
    used = plan.rows * spec.head_dim + plan.num_stages * plan.tile * (spec.head_dim + spec.v_head_dim)
    assert used * size <= shared << 10
    for num_sequences, max_context in ((1, 8192), (64, 512)):
        decode = plan_decode(spec, cache, 132, shared << 10, num_sequences, max_context)
        assert decode.programs >= 132
        tiles = (decode.num_stages - 1) * decode.tile * shape.bytes_per_token(*kinds) // spec.num_kv_heads
        assert tiles <= shared << 10


kinds = st.sampled_from([("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("int8", "int4"), (None, "int4"),
                         ("int4", None), ("fp8", "int8")])  # fmt: skip


@settings(max_examples=6, deadline=None)
@given(
    kinds=kinds,
    heads=st.sampled_from([(1, 1), (3, 1), (8, 2)]),
    dims=st.sampled_from([(16, 16), (32, 48), (80, 80), (64, 64)]),
    window=st.sampled_from([None, None, 5]),
    softcap=st.sampled_from([None, None, 2.0]),
    decodes=st.lists(one_decode, max_size=3),
    chunks=st.lists(one_chunk, max_size=2),
    block_size=st.sampled_from([8, 64]),
    seed=st.integers(0, 99),
)
def test_a_mixed_step_over_codes(
    kinds: tuple[KvKind, KvKind], heads: tuple[int, int], dims: tuple[int, int], window: int | None,
    softcap: float | None, decodes: list[tuple[int, int]], chunks: list[tuple[int, int]], block_size: int, seed: int,
) -> None:  # fmt: skip
    spec = spec_of(*heads, *dims, window=window, softcap=softcap)
    case = make_case(spec, [*decodes, *chunks] or [(1, 3)], block_size, torch.float16, seed, kinds)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, case.spec, out)
    case.check(out)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_divided_pairs_over_codes(kind: KvKind) -> None:
    case = make_case(spec_of(2, 1, 32), [(1, 70), (1, 1), (1, 0), (1, 17)], 16, torch.float16, 0, (kind, kind))
    first = run_decode(case, DecodePlan(16, 4, 1, 3))
    case.check(first)
    assert torch.equal(first, run_decode(case, DecodePlan(16, 4, 1, 3)))
    case.check(run_decode(case, DecodePlan(32, 3, 1, 3, reduce_apart=True)))


def test_large_and_small_numbers_over_codes() -> None:
    """Queries beyond the range of float16, and values far below 1."""
    case = make_case(spec_of(2, 1, 32), [(1, 40), (20, 30)], 16, torch.float32, 0, ("int8", "int8"))
    case.qkv *= 1e6
    cache = case.plain
    assert cache.k_scales is not None and cache.v_scales is not None
    case.plain = replace(cache, k_scales=cache.k_scales / 1024, v_scales=cache.v_scales / 1024)
    case.spec = replace(case.spec, scale=1e-3)
    out = case.empty_out()
    attention(case.qkv, case.batch, case.cache, case.spec, out)
    torch.testing.assert_close(1024 * out, 1024 * case.expected(), atol=2e-2, rtol=1e-2)
