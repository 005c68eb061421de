"""int4 and int8 matrices, and fp8 ones: their values, and that rows and parts are those of the dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.errors import ConfigError
from turbolm.quant.fp8 import block_shape, fp8
from turbolm.quant.int4 import int4
from turbolm.quant.int8 import int8
from turbolm.weights import Weight


def random_int4(n: int, k: int, group: int, has_columns: bool = False, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(k, generator=generator) if has_columns else None
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator).to(torch.float16)
    zeros = torch.randint(0, 17, (n, k // group), generator=generator, dtype=torch.uint8)
    return int4(codes, scales, zeros, columns)


def random_int8(n: int, k: int, group: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return int8(codes, torch.rand(n, k // group, generator=generator))


def random_fp8(n: int, k: int, rows: int, columns: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    return fp8(codes, torch.rand(-(-n // rows), -(-k // columns), generator=generator))


KINDS: dict[str, Callable[[int, int], Weight]] = {
    "int4-group": lambda n, k: random_int4(n, k, 64),
    "int4-row": lambda n, k: random_int4(n, k, k),
    "int4-order": lambda n, k: random_int4(n, k, 64, has_columns=True),
    "int8-group": lambda n, k: random_int8(n, k, 64),
    "int8-row": lambda n, k: random_int8(n, k, k),
    "fp8-matrix": lambda n, k: random_fp8(n, k, n, k),
    "fp8-row": lambda n, k: random_fp8(n, k, 1, k),
    "fp8-block": lambda n, k: random_fp8(n, k, 128, 128),
}


def plain(weight: Weight) -> Tensor:
    return weight.dequantize(torch.float32)


def test_int4_values_one_by_one() -> None:
    weight = random_int4(3, 8, 4, has_columns=True)
    tensors = weight.tensors
    expected = torch.empty(3, 8)
    for row in range(3):
        for j in range(8):
            byte = int(tensors["codes"][row, j // 2])
            code = byte >> 4 if j % 2 else byte & 15
            value = (code - int(tensors["zeros"][row, j // 4])) * float(tensors["scales"][row, j // 4])
            expected[row, int(tensors["columns"][j])] = value
    assert torch.equal(plain(weight), expected)


def test_int8_values_one_by_one() -> None:
    weight = random_int8(3, 8, 4)
    codes, scales = weight.tensors["codes"], weight.tensors["scales"]
    expected = [[int(codes[row, j]) * float(scales[row, j // 4]) for j in range(8)] for row in range(3)]
    assert torch.allclose(plain(weight), torch.tensor(expected), rtol=1e-6)


def test_fp8_values_of_blocks_that_are_cut_off() -> None:
    weight = random_fp8(200, 300, 128, 128)
    codes, scales = weight.tensors["codes"].float(), weight.tensors["scales"]
    assert block_shape(weight) == (128, 128)
    for row, column in ((0, 0), (127, 128), (128, 127), (199, 299), (199, 255)):
        assert plain(weight)[row, column] == codes[row, column] * scales[row // 128, column // 128]


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_rounded_to_the_dtype_once(kind: str) -> None:
    weight = KINDS[kind](130, 256)
    assert torch.equal(weight.dequantize(torch.bfloat16), plain(weight).to(torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_select_rows(kind: str, data: st.DataObject) -> None:
    weight = KINDS[kind](140, 256)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 139), min_size=1, max_size=9)))
    selected = weight.format.select_rows(weight, rows)
    assert selected.shape == (len(rows), 256)
    assert torch.equal(plain(selected), plain(weight)[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "size"), [(0, 1), (0, 2), (0, 7), (1, 2), (1, 4)])
def test_shard(kind: str, dim: int, size: int) -> None:
    weight = KINDS[kind](256 if size == 2 else 28, 512)
    shards = [weight.format.shard(weight, dim, rank, size) for rank in range(size)]
    assert all(shard.shape[dim] == weight.shape[dim] // size for shard in shards)
    together = torch.cat([plain(shard) for shard in shards], dim=dim)
    expected = weight.dequantize(torch.float16).float() if kind == "int4-order" and dim == 1 else plain(weight)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_concat(kind: str) -> None:
    first, second = KINDS[kind](256, 256), KINDS[kind](130, 256)
    both = first.format.concat([first, second])
    assert both.shape == (386, 256)
    assert torch.equal(plain(both), torch.cat([plain(first), plain(second)]))


@pytest.mark.parametrize(
    ("kind", "dim", "size", "message"),
    [
        ("int4-group", 0, 3, r"3 devices along its 28 rows.*divides 28"),
        ("int4-group", 1, 3, r"3 devices along its 512 columns \(8 int4 groups of 64\).*divides 8"),
        ("int8-group", 1, 16, r"8 int8 groups of 64"),
        ("fp8-row", 0, 3, r"28 rows"),
        ("fp8-block", 1, 8, r"64 of them are not whole fp8 blocks of 128"),
    ],
)
def test_parts_that_are_not_whole(kind: str, dim: int, size: int, message: str) -> None:
    weight = KINDS[kind](28, 512)
    with pytest.raises(ConfigError, match=message):
        weight.format.shard(weight, dim, 0, size)


def test_calibrated_activations_stay_with_the_weight() -> None:
    weight = fp8(torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(4, 1), torch.tensor([0.5]))
    other = fp8(torch.zeros(2, 8).to(torch.float8_e4m3fn), torch.ones(1, 1), torch.tensor(0.75))
    assert weight.tensors["input_scale"].shape == ()
    assert weight.format.shard(weight, 0, 1, 2).tensors["input_scale"] == 0.5
    assert weight.format.concat([weight, other]).tensors["input_scale"] == 0.75


def test_tensors_that_make_no_matrix() -> None:
    codes, scales, zeros = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.uint8)
    int4(codes, scales, zeros)
    for wrong in ((codes, scales[:3], zeros[:3]), (codes, torch.ones(4, 3), zeros), (codes.int(), scales, zeros)):
        with pytest.raises(ValueError, match="int4"):
            int4(*wrong)
    with pytest.raises(ValueError, match="columns"):
        int4(codes, scales, zeros, torch.arange(8))
    with pytest.raises(ValueError, match="int8"):
        int8(codes, scales)
    with pytest.raises(ValueError, match="fp8"):
        fp8(torch.zeros(300, 300).to(torch.float8_e4m3fn), torch.ones(2, 3))
