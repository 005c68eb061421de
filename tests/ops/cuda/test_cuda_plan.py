from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.ops.cuda.linear import plan_arguments
from turbolm.ops.cuda.plan import (
    DENSE,
    INT4,
    INT8,
    MAX_TOKENS,
    X_BUFFERS,
    Gpu,
    Output,
    Unit,
    plan_linear,
    supports_shape,
)

H200 = Gpu(132, 232_448, 233_472)
A100 = Gpu(108, 166_912, 167_936)
RTX_4090 = Gpu(128, 101_376, 102_400)


@given(
    t=st.integers(1, MAX_TOKENS),
    half=st.integers(1, 30_000),
    units=st.integers(1, 250),
    output=st.sampled_from(Output),
    gpu=st.sampled_from([H200, A100, RTX_4090]),
    unit=st.sampled_from([DENSE, INT8, *INT4.values()]),
)
def test_every_output_and_k_is_covered_once(
    t: int, half: int, units: int, output: Output, gpu: Gpu, unit: Unit
) -> None:
    n = 2 * half if not unit.groups else 16 * -(-half // 8)
    gpu = gpu if unit is DENSE else H200  # small GPUs have no room for many rows of x, in larger units
    plan = plan_linear(t, n, unit.k * units, output, gpu, unit)
    assert plan is not None
    arguments = plan_arguments(plan)
    covered = np.zeros((-(-n // 16), units), dtype=np.int8)
    shares, slices = set(), []
    for group in range(plan.groups):
        first = group * arguments.tiles + min(group, arguments.tiles_extra)
        last = first + arguments.tiles + (group < arguments.tiles_extra)
        for split in range(plan.splits):
            unit = split * arguments.units + min(split, arguments.units_extra)
            count = arguments.units + (split < arguments.units_extra)
            covered[first:last, unit : unit + count] += 1
            shares.add((last - first, count))
            slices.append(-(-count // plan.tile.slice_units))
    assert (covered == 1).all()
    assert all(tiles >= 1 and count >= 1 for tiles, count in shares)
    assert max(shares)[0] == plan.cta_tiles and max(count for _, count in shares) == plan.cta_units
    # what the kernel takes for granted where x goes through buffers
    assert plan.resident or min(slices) >= X_BUFFERS
    assert plan.tile.tokens >= t
    assert plan.groups * plan.splits <= gpu.num_sms
    assert plan.splits == 1 or output is Output.PARTS
    assert plan.shared_bytes <= gpu.shared_per_cta
    first_tile, tiles, first_unit, per_tile = plan.prefetch
    assert 0 <= tiles <= max(0, plan.cta_tiles - first_tile) and 0 <= per_tile <= plan.cta_units - first_unit


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (4096, 14336)])
@pytest.mark.parametrize("t", [1, 8, 16, 32, 64])
def test_layers_of_large_models_fill_the_gpu_and_leave_room(shape: tuple[int, int], t: int) -> None:
    """On an H200: nearly every SM is busy, evenly, and the next kernel can move in before the end."""
    plan = plan_linear(t, *shape, Output.PARTS, H200)
    assert plan is not None
    assert plan.groups * plan.splits >= 120
    assert plan.cta_bytes * H200.num_sms <= 1.1 * shape[0] * shape[1] * 2
    assert plan.shares_sm(H200)


@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 4096), (4096, 11008), (1024, 1024)])
@pytest.mark.parametrize("unit", [DENSE, INT8, *INT4.values()])
def test_no_sm_gets_two_ctas_of_a_kernel_that_starts_early(shape: tuple[int, int], unit: Unit) -> None:
    plan = plan_linear(1, *shape, Output.PARTS, H200, unit)
    assert plan is not None
    has_sm = 2 * (plan.asked_bytes(H200) + 1024) > H200.shared_per_sm
    assert has_sm or plan.groups * plan.splits == H200.num_sms
    assert plan.shared_bytes <= plan.asked_bytes(H200) <= H200.shared_per_cta


@pytest.mark.parametrize(
    ("t", "n", "k"), [(0, 64, 64), (65, 64, 64), (1, 64, 96), (1, 64, 0), (1, 0, 64), (1, 1 << 20, 4096)]
)
def test_shapes_that_are_not_supported(t: int, n: int, k: int) -> None:
    assert not supports_shape(t, n, k)
    assert plan_linear(t, n, k, Output.PARTS, H200) is None


@pytest.mark.parametrize(("n", "k"), [(40, 128), (64, 192)])
def test_4_bits_need_whole_units(n: int, k: int) -> None:
    assert not supports_shape(1, n, k, INT4[64]) and supports_shape(1, n, k)
