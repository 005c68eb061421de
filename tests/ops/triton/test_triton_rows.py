"""Row kernels against the ops in plain torch, computed in float32."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.cache.spec import CacheSpec
from turbolm.kv import KvFormat, KvKind, KvShape
from turbolm.kv_scales import LayerRanges
from turbolm.ops import Activation, AttentionSpec, LayerCache, RopeTable
from turbolm.ops.reference import ReferenceLinear, ReferenceOps
from turbolm.ops.triton import rows
from turbolm.ops.triton.tiles import pair_tokens
from turbolm.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, where a GPU is silent

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
REFERENCE = ReferenceOps(DEVICE, torch.float32)
# Triton's interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = {torch.bfloat16: 2**-7 if DEVICE.type == "cpu" else 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_parts(num_parts: int, num_tokens: int, width: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a matrix product hands on (0 parts: finished, its rows part of longer ones), and its value in float32."""
    if num_parts == 0:
        finished = random(num_tokens, width + 16, seed=seed, dtype=dtype)[:, :width]
        return finished, finished.float()
    parts = random(num_parts, num_tokens, width, seed=seed)
    return parts, parts.sum(0)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """Equal, but for the rounding to the dtype and of the last bits of float32."""
    assert bool(actual.isfinite().all())
    torch.testing.assert_close(actual.float(), expected, rtol=ROUNDING[actual.dtype], atol=2e-6)


DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
PARTS = st.sampled_from([0, 1, 2, 5])


@pytest.mark.parametrize("scale", [1.0, 45.25])
def test_embedding(scale: float) -> None:
    table = random(50, 70, seed=0, dtype=torch.bfloat16)
    ids = torch.tensor([3, 49, 0, -1, 50, 3], dtype=torch.int32, device=DEVICE)
    out = torch.empty(6, 70, dtype=torch.bfloat16, device=DEVICE)
    rows.embedding(ids, table, scale, out)
    expected = REFERENCE.embedding(
        torch.tensor([3, 49, 0, 0, 0, 3], device=DEVICE), ReferenceLinear(50, 70, table.float(), (), None), scale
    )
    assert_rounded(out, expected)


def test_embedding_of_rows_longer_than_a_program() -> None:
    table = random(3, 2500, seed=1, dtype=torch.float16)
    out = torch.empty(2, 2500, dtype=torch.float16, device=DEVICE)
    rows.embedding(torch.tensor([2, 1], device=DEVICE), table, 1.0, out)
    assert torch.equal(out, table[[2, 1]])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(num_parts=PARTS, width=st.sampled_from([1, 64, 100, 576, 1500]), dtype=DTYPES, seed=st.integers(0, 99))
def test_norms(num_parts: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, value = random_parts(num_parts, 3, width, seed, dtype)
    weight = random(width, seed=seed + 1, dtype=dtype)
    out = torch.empty(3, width, dtype=dtype, device=DEVICE)
    rows.rms_norm(x, weight, 1e-5, out)
    assert_rounded(out, REFERENCE.rms_norm(value, weight, 1e-5))

    residual = random(3, width, seed=seed + 2, dtype=dtype)
    expected = (residual.float() + value).to(dtype)
    rows.add_rms_norm(x, residual, weight, 1e-5, out)
    assert_rounded(residual, expected.float())
    assert_rounded(out, REFERENCE.rms_norm(residual.float(), weight, 1e-5))


def test_norm_of_zeros() -> None:
    out = torch.empty(1, 64, dtype=torch.bfloat16, device=DEVICE)
    rows.rms_norm(torch.zeros_like(out), torch.ones(64, device=DEVICE), 1e-6, out)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("num_parts", [0, 3])
def test_add(num_parts: int) -> None:
    x, value = random_parts(num_parts, 2, 1100, 0, torch.bfloat16)
    residual = random(2, 1100, seed=1, dtype=torch.bfloat16)
    expected = residual.float() + value
    rows.add(x, residual)
    assert_rounded(residual, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("num_parts", [0, 2])
def test_activate_multiply(activation: Activation, num_parts: int) -> None:
    x, value = random_parts(num_parts, 2, 600, 3, torch.float16)
    out = torch.empty(2, 300, dtype=torch.float16, device=DEVICE)
    rows.activate_multiply(4 * x, activation, out)
    assert_rounded(out, REFERENCE.activate_multiply(4 * value, activation))


def test_activations_of_large_numbers() -> None:
    x = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], dtype=torch.bfloat16, device=DEVICE)
    for activation in ("silu", "gelu", "gelu_tanh"):
        out = torch.empty(1, 2, dtype=torch.bfloat16, device=DEVICE)
        rows.activate_multiply(x, cast(Activation, activation), out)
        assert out.tolist() == [[0.0, torch.tensor(1e4).bfloat16().item()]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_resolve_tokens(dtype: torch.dtype) -> None:
    ids = torch.tensor([5, -1, 0, -3, -2, *range(300), -4], dtype=torch.int32, device=DEVICE)
    rows.resolve_tokens(ids, torch.tensor([11, -1, 13], dtype=dtype, device=DEVICE))
    assert ids.tolist() == [5, 11, 0, 13, 0, *range(300), 0]  # a failed row, and one that there isn't, give 0


def make_batch(positions: list[int], slots: list[int]) -> Batch:
    columns = {name: torch.tensor(v, dtype=torch.int32) for name, v in (("positions", positions), ("slots", slots))}
    return cast(Batch, SimpleNamespace(**{name: column.to(DEVICE) for name, column in columns.items()}))


@settings(max_examples=14, deadline=None, derandomize=True)
@given(
    num_parts=PARTS,
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    dims=st.sampled_from([(64, 64), (80, 80), (96, 64), (128, 128), (256, 128)]),
    rotary=st.sampled_from([None, 32, 64, -1]),
    interleaved=st.booleans(),
    norms=st.sampled_from([(False, False), (True, True), (True, False)]),
    per_program=st.sampled_from([None, 2, 8]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_rotary_store(
    num_parts: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    rotary: int | None,
    interleaved: bool,
    norms: tuple[bool, bool],
    per_program: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    spec = AttentionSpec(*heads, *dims, scale=1.0)
    rope = None
    if rotary is not None:
        angles = 6 * random(40, (dims[0] if rotary < 0 else rotary) // 2, seed=seed + 4)
        rope = RopeTable(angles.cos(), angles.sin(), interleaved)
    q_norm, k_norm = (random(dims[0], seed=seed + i, dtype=dtype) if used else None for i, used in enumerate(norms))
    x, value = random_parts(num_parts, 3, spec.qkv_width, seed, dtype)
    cache, expected_cache = (
        LayerCache(*(torch.zeros(5, heads[1], 8, d, dtype=kind, device=DEVICE) for d in dims))
        for kind in (dtype, torch.float32)
    )
    positions, slots = [0, 39, 7], [33, -1, 9]
    out = x if num_parts == 0 else torch.empty(3, spec.qkv_width, dtype=dtype, device=DEVICE)
    batch = make_batch(positions, slots)
    rows.rotary_store(x, batch.positions, batch.slots, cache, spec, rope, q_norm, k_norm, 1e-6, out, heads=per_program)

    kept = torch.tensor([0, 2], device=DEVICE)
    expected = value.clone()
    everything = make_batch(positions, [33, 0, 9])
    REFERENCE.rotary_store(expected, everything, expected_cache, spec, rope, q_norm, k_norm, 1e-6)
    for pool in (expected_cache.k, expected_cache.v):
        pool[0, :, 0] = 0.0  # the row without a slot
    torch.testing.assert_close(out.float(), expected, rtol=ROUNDING[dtype], atol=2e-5)
    start = spec.q_width + spec.num_kv_heads * spec.head_dim
    for pool, wanted, part in (
        (cache.k, expected_cache.k, out[:, spec.q_width : start]),
        (cache.v, expected_cache.v, out[:, start:]),
    ):
        torch.testing.assert_close(pool.float(), wanted, rtol=ROUNDING[dtype], atol=2e-5)
        stored = pool[[4, 1], :, 1].flatten(1)  # slots 33 and 9
        assert torch.equal(stored, part[kept])  # to the bit what attention reads in the row


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    kinds=st.sampled_from(
        [("int8", "int4"), ("int4", "fp8"), ("fp8", "int8"), ("float16", "int4"), ("int8", "float16")]
    ),
    heads=st.sampled_from([(1, 1), (9, 3)]),
    dims=st.sampled_from([(64, 64), (80, 80), (96, 64)]),
    rope=st.sampled_from([None, (32, False), (64, True)]),
    per_program=st.sampled_from([None, 2]),
    fixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotary_store_of_codes(
    kinds: tuple[KvKind, KvKind], heads: tuple[int, int], dims: tuple[int, int], rope: tuple[int, bool] | None,
    per_program: int | None, fixed: bool, seed: int,
) -> None:  # fmt: skip
    """To the bit what the reference makes of the finished row."""
    spec = AttentionSpec(*heads, *dims, scale=1.0)
    angles = 6 * random(40, 0 if rope is None else rope[0] // 2, seed=seed)
    table = None if rope is None else RopeTable(angles.cos(), angles.sin(), rope[1])
    out = 3 * random(3, spec.qkv_width, seed=seed, dtype=torch.float16)
    out[0, -spec.v_head_dim :] = 1.5  # a head without range
    out[2, -1] = 1000.0
    limits = tuple((-3.0 - head, 2.0 + head) for head in range(heads[1]))
    ranges = (LayerRanges(limits, limits[::-1]),) if fixed else ()
    layout = CacheSpec((KvShape(heads[1], *dims),), KvFormat(*kinds, "float16"), ranges)
    (cache,), (expected,) = (layout.allocate(5, 8, torch.device(DEVICE)) for _ in range(2))
    batch = make_batch([0, 39, 7], [33, -1, 9])
    rows.rotary_store(
        out, batch.positions, batch.slots, cache, spec, table, None, None, 1e-6, out, heads=per_program
    )  # fmt: skip
    kept = make_batch([0, 7], [33, 9])
    REFERENCE.rotary_store(out[[0, 2]], kept, expected, spec, None, None, None, 1e-6)
    expected = pair_tokens(expected)
    for name in ("k", "v", "k_scales", "v_scales"):
        found, wanted = getattr(cache, name), getattr(expected, name)
        assert found is None or torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name
