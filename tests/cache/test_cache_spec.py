"""The memory of the KV pool is what the plan counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.cache.spec import CacheSpec
from turbolm.kv import KINDS, KvFormat, KvKind, KvShape, bytes_per_token
from turbolm.kv_scales import LayerRanges
from turbolm.ops import LayerCache

CPU = torch.device("cpu")
kinds = st.sampled_from(KINDS)


@settings(deadline=None)
@given(kind_k=kinds, kind_v=kinds, skipped=st.sets(st.integers(0, 2)), block_size=st.sampled_from([8, 16]))
def test_the_pool_takes_what_the_plan_says(kind_k: KvKind, kind_v: KvKind, skipped: set[int], block_size: int) -> None:
    kv = KvFormat(kind_k, kind_v, "float16", tuple(sorted(skipped)))
    layers = (KvShape(2, 32, 32), KvShape(1, 80, 64), KvShape(4, 16, 16))
    caches = CacheSpec(layers, kv).allocate(3, block_size, CPU)
    pools = [pool for c in caches for pool in (c.k, c.v, c.k_scales, c.v_scales) if pool is not None]
    assert sum(pool.nbytes for pool in pools) == 3 * block_size * bytes_per_token(layers, kv)
    for index, cache in enumerate(caches):
        assert (cache.kind_k, cache.kind_v) == (("float16", "float16") if index in skipped else (kind_k, kind_v))
        assert cache.block_size == block_size
    assert not any(pool.float().any() for pool in pools)


def test_codes_come_with_scales_and_need_a_kind() -> None:
    (cache,) = CacheSpec((KvShape(2, 32, 48),), KvFormat("int4", "fp8", "float16")).allocate(5, 16, CPU)
    assert (cache.k.dtype, cache.k.shape) == (torch.uint8, (5, 2, 16, 16))
    assert (cache.v.dtype, cache.v.shape) == (torch.float8_e4m3fn, (5, 2, 16, 48))
    assert cache.k_scales is not None and cache.k_scales.shape == (5, 2, 16, 2)
    assert cache.k_scales.dtype == torch.float16
    assert cache.v_scales is None
    assert LayerCache(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)).kind_v == "float32"
    with pytest.raises(AssertionError):
        LayerCache(cache.k, cache.v)


def test_static_ranges_are_those_of_int8_alone() -> None:
    ranges = LayerRanges(((-2.55, 0.0), (1.0, 1.0)), ((0.0, 510.0), (-1.0, 1.0)))
    layers = (KvShape(2, 32, 32),) * 2
    spec = CacheSpec(layers, KvFormat("int8", "int4", "float16", skipped=(1,)), (ranges,) * 2)
    first, second = spec.allocate(2, 8, CPU)
    assert first.k_range is not None and first.k_range.dtype == torch.float16
    expected = torch.tensor([[0.01, -2.55], [2.0**-14, 1.0]])
    torch.testing.assert_close(first.k_range.float(), expected, rtol=1e-3, atol=0)
    assert first.v_range is second.k_range is second.v_range is None
