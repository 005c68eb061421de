"""Linear layers in Triton against torch, computed in float32; and the plans that lay them out."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.errors import EngineError
from turbolm.ops.triton.linear import (
    MAX_TOKENS,
    Output,
    Plan,
    linear_gated,
    linear_logits,
    linear_parts,
    plan_wide,
    run,
    supports,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, where a GPU is silent

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
# Triton's interpreter multiplies bfloat16 as if it were integers.
DTYPES = [torch.float16] if DEVICE.type == "cpu" else [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
SHARED_MEMORY = 227 << 10  # bytes that a program may have on an H200


def random(*shape: int, seed: int, dtype: torch.dtype = DTYPES[0]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected, rtol=ROUNDING[actual.dtype], atol=2e-3)


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.float(), w.float(), None if bias is None else bias.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "n", "k"),
    [
        (17, 192, 256),
        (33, 96, 520),  # k ends within a block
        (40, 130, 136),  # n ends within a tile
        (3, 64, 8),
    ],
)
def test_parts_add_up(t: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = random(t, k, seed=0, dtype=dtype), random(n, k, seed=1, dtype=dtype), random(n, seed=2, dtype=dtype)
    parts = linear_parts(x, w, bias)
    assert parts.dtype == (torch.float32 if parts.dim() == 3 else dtype)
    assert_rounded(parts.sum(0) if parts.dim() == 3 else parts, product(x, w, bias))


@pytest.mark.parametrize(("rows", "splits"), [(48, 1), (48, 3), (128, 2), (16, 5), (96, 5)])
def test_any_tile_and_number_of_parts(rows: int, splits: int) -> None:
    t, n, k = 20, 192, 64 * 5
    x, w, bias = random(t, k, seed=3), random(n, k, seed=4), random(n, seed=5)
    block_rows = 64 if rows < 64 else 128
    tiles = -(-n // rows)
    plan = Plan(32, block_rows, 64, 3, 4, rows, tiles, splits, tiles)
    out = torch.full((splits, t, n), float("nan"), device=DEVICE)
    run(plan, Output.PARTS, x, w, bias, out)
    assert_rounded(out.sum(0), product(x, w, bias))


def test_each_part_is_a_share_of_k() -> None:
    x, w = random(18, 256, seed=6), random(64, 256, seed=7)
    out = torch.empty(4, 18, 64, device=DEVICE)
    run(Plan(32, 64, 64, 3, 4, 64, 1, 4, 1), Output.PARTS, x, w, None, out)
    for i, part in enumerate(out):
        share = slice(64 * i, 64 * (i + 1))
        assert_rounded(part, product(x[:, share], w[:, share]))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("features", [48, 100, 640])
def test_gated(activation: str, features: int) -> None:
    x, w = random(19, 128, seed=8), random(2 * features, 128, seed=9) * 0.1
    both = product(x, w)
    expected = ACTIVATIONS[activation](both[:, :features]) * both[:, features:]
    assert_rounded(linear_gated(x, w, activation), expected)


@pytest.mark.parametrize(("n", "output"), [(1280, Output.FLOATS), (1300, Output.ELEMENTS), (2592, Output.GATED)])
def test_programs_that_go_on_over_tiles(n: int, output: Output) -> None:
    x, w = random(20, 72, seed=10), random(n, 72, seed=11) * 0.2
    plan = plan_wide(20, n, 72, output, 4)
    assert plan is not None and plan.persistent
    out = torch.empty(20, n, dtype=torch.float32 if output is Output.FLOATS else x.dtype, device=DEVICE)
    expected = product(x, w)
    if output is Output.GATED:
        out = out[:, : n // 2].contiguous()
        expected = F.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
    run(plan, output, x, w, None, out)
    assert_rounded(out, expected)


def test_logits_into_given_memory() -> None:
    x, w = random(5, 64, seed=12), random(48, 64, seed=13)
    out = torch.full((6, 48), 7.0, device=DEVICE)
    assert linear_logits(x, w, out[:5]).data_ptr() == out.data_ptr()
    assert_rounded(out[:5], product(x, w))
    assert bool((out[5] == 7).all())


def test_rows_of_x_may_be_part_of_longer_ones() -> None:
    wide, w = random(17, 200, seed=14), random(64, 128, seed=15)
    for first in (0, 8, 3):  # 3: not aligned as TMA wants it
        x = wide[:, first : first + 128]
        parts = linear_parts(x, w)
        assert_rounded(parts.sum(0) if parts.dim() == 3 else parts, product(x, w))


def test_a_shape_without_kernel_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"x \[17, 60\] and w \[64, 60\]"):
        linear_parts(random(17, 60, seed=16), random(64, 60, seed=17))
    with pytest.raises(EngineError):
        linear_logits(random(MAX_TOKENS + 1, 64, seed=18), random(64, 64, seed=19))
    with pytest.raises(EngineError):
        linear_gated(random(17, 64, seed=20), random(63, 64, seed=21), "silu")
    assert not supports(17, 64, 64, torch.float32)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    t=st.integers(1, MAX_TOKENS),
    n=st.one_of(st.integers(1, 300).map(lambda i: 2 * i), st.integers(1, 9000).map(lambda i: 16 * i)),
    k=st.integers(1, 2000).map(lambda i: 8 * i),
    output=st.sampled_from(Output),
    num_sms=st.sampled_from([4, 66, 114, 132]),
)
def test_plans_cover_the_result_and_fit(t: int, n: int, k: int, output: Output, num_sms: int) -> None:
    plan = plan_wide(t, n, k, output, num_sms)
    assert plan is not None
    halves = 2 if output is Output.GATED else 1
    features = n // halves
    assert t <= plan.block_tokens and plan.rows <= plan.block_rows
    assert (plan.tiles - 1) * plan.rows < features <= plan.tiles * plan.rows
    assert plan.flat or plan.tiles * plan.rows == features, "a tile must not read into what follows w"
    assert plan.splits == 1 or (output is Output.PARTS and not plan.persistent)
    assert plan.splits <= -(-k // plan.block_k), "every program needs a step"
    assert plan.programs <= plan.tiles
    ring = plan.stages * (halves * plan.block_rows + plan.block_tokens) * plan.block_k * 2
    assert plan.stages >= 3 and ring < SHARED_MEMORY
    accumulators = halves * plan.block_rows * plan.block_tokens / (32 * plan.num_warps)
    assert accumulators <= 128, "what is left of a thread's 255 registers addresses memory"


def test_large_layers_occupy_an_h200() -> None:
    shapes = [(28672, 4096, Output.GATED), (4096, 14336, Output.PARTS), (128256, 4096, Output.FLOATS)]
    for n, k, output in shapes:
        plan = plan_wide(64, n, k, output, 132)
        assert plan is not None
        assert 110 <= plan.programs * plan.splits <= 132
        in_flight = (plan.stages - 1) * plan.rows * plan.block_k * 2 * (2 if output is Output.GATED else 1)
        assert in_flight >= 96 << 10


def test_knobs_change_no_result() -> None:
    x, w = random(17, 128, seed=22), random(96, 128, seed=23)
    plan = plan_wide(17, 96, 128, Output.FLOATS, 4)
    assert plan is not None
    results = []
    for other in (plan, replace(plan, stages=2, num_warps=4), replace(plan, block_k=128, trigger=0, prefetch=512)):
        results.append(torch.empty(17, 96, device=DEVICE))
        run(other, Output.FLOATS, x, w, None, results[-1], overlap=other is plan)
    for result in results:
        assert_rounded(result, product(x, w))
