"""Packed matrices and their products, against the formats' own values and a model of the arithmetic."""

from __future__ import annotations

import ctypes
import gc
import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbolm.ops.cpu import instructions, library
from turbolm.ops.cpu.matmul import FORMATS as PACKABLE
from turbolm.ops.cpu.matmul import PackedLinear, pack, workspace_bytes
from turbolm.ops.cpu.ops import CpuOps
from turbolm.quant import FORMATS
from turbolm.quant.gguf_blocks import BlockFormat
from turbolm.weights import Weight

ISAS = [name for name in library.ISA_NAMES if library.select_isa(name)]
assert library.select_isa("")
QUANTIZED = [name for name in PACKABLE if FORMATS[name].block_size > 1]
DENSE = ["f32", "f16", "bf16"]
ROUNDS_TO_BF16 = ("avx512bf16", "amx")  # x, where the weights are bf16
WITH_MINIMA = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
OPS = {threads: CpuOps(threads=threads) for threads in (1, 2)}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert library.select_isa(request.param)
    yield request.param
    assert library.select_isa("")


def make_weight(name: str, n: int, k: int, seed: int = 0) -> Weight:
    """Random block bytes (finite scales of either sign), or random floats."""
    generator = torch.Generator().manual_seed(seed)
    weight_format = FORMATS[name]
    if name in DENSE:
        data = torch.randn(n, k, generator=generator).to(weight_format.storage_dtype)
        return Weight(weight_format, (n, k), {"data": data})
    blocks = k // weight_format.block_size
    width = weight_format.block_width
    data = torch.randint(0, 256, (n, blocks, width), generator=generator, dtype=torch.uint8)
    factors = (torch.randn(n, blocks, 2, generator=generator) * 0.01).half().view(torch.uint8).view(n, blocks, 4)
    start = {"q2_k": 80, "q3_k": 108, "q6_k": 208}.get(name, 0)
    count = 4 if name in WITH_MINIMA else 2
    data[:, :, start : start + count] = factors[:, :, :count]
    return Weight(weight_format, (n, k), {"data": data.view(n, blocks * width)})


def random_rows(rows: int, k: int, seed: int = 1) -> Tensor:
    """Values of very different sizes, with an outlier here and there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    return x * torch.rand(rows, k, generator=generator).pow(3) * 10


def quantize(x_tk: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels make of x → (values float64 [t, k], scale of each value)."""
    blocks = x_tk.view(x_tk.shape[0], -1, 32)
    largest = blocks.abs().amax(2, keepdim=True)
    scale = largest * (torch.tensor(1.0) / 127)
    inverse = torch.where(largest > 0, torch.div(torch.tensor(127.0), largest), torch.tensor(0.0))
    rounded = torch.round(blocks * inverse).double() * scale.double()
    return rounded.view(x_tk.shape).double(), scale.double().expand(blocks.shape).reshape(x_tk.shape)


def packed(weights: list[Weight], bias: Tensor | None = None, unpack: bool = False) -> PackedLinear:
    linear = pack(weights, bias, unpack=unpack)
    assert linear is not None
    return linear


def multiply(x: Tensor, linear: PackedLinear, threads: int = 2) -> Tensor:
    return OPS[threads].linear(x, linear)


def check_product(y: Tensor, x: Tensor, weight: Weight) -> None:
    w = weight.dequantize(torch.float32).double()
    magnitude = x.abs().double() @ w.abs().T
    if weight.format.name in DENSE:
        is_rounded = weight.format.name == "bf16" and library.isa() in ROUNDS_TO_BF16
        exact = x.bfloat16().double() if is_rounded else x.double()
        assert ((y - exact @ w.T).abs() <= 1e-6 * magnitude + 1e-12).all()
        return
    quantized, scale = quantize(x)
    # Nothing but float32 rounding separates the kernels from exact sums over the rounded activations…
    size = (quantized.abs() + scale) @ w.abs().T
    cancellation = 20 if weight.format.name in WITH_MINIMA else 1  # of products and minima
    assert ((y - quantized @ w.T).abs() <= 1e-6 * cancellation * size + 1e-12).all()
    # … and nothing but that rounding, at most half a step per value, from the true product.
    assert ((y - x.double() @ w.T).abs() <= 0.502 * scale @ w.abs().T + 1e-5 * size + 1e-12).all()


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 83, 512), (7, 16, 256), (8, 50, 768), (21, 33, 256), (77, 40, 512)])
def test_product(isa: str, name: str, rows: int, n: int, k: int) -> None:
    weight = make_weight(name, n, k)
    x = random_rows(rows, k)
    check_product(multiply(x, packed([weight])), x, weight)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(PACKABLE)))
    block = FORMATS[name].block_size
    k = data.draw(st.integers(1, 70)) if block == 1 else block * data.draw(st.integers(1, 5))
    n, rows = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    weight = make_weight(name, n, k, seed=rows)
    x = random_rows(rows, k, seed=n)
    check_product(multiply(x, packed([weight]), threads=data.draw(st.sampled_from([1, 2]))), x, weight)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 1), (3, 20, 31), (33, 49, 33), (47, 32, 95)])
def test_dense_of_any_width(isa: str, name: str, rows: int, n: int, k: int) -> None:
    weight = make_weight(name, n, k)
    x = random_rows(rows, k)
    check_product(multiply(x, packed([weight])), x, weight)


def test_bf16_activations_are_rounded_to_nearest_even(isa: str) -> None:
    """Where they are rounded at all; 1 + 2^-8 is halfway between two bf16."""
    x = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)]]).T.repeat(1, 2)
    x[:, 1] = 0
    y = multiply(x, packed([Weight(FORMATS["bf16"], (1, 2), {"data": torch.ones(1, 2, dtype=torch.bfloat16)})]))
    assert torch.equal(y[:, 0], x[:, 0].bfloat16().float() if isa in ROUNDS_TO_BF16 else x[:, 0])


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "f16", "bf16"])
def test_long_rows_and_many_of_them(name: str) -> None:
    weight = make_weight(name, 48, 4864)
    x = random_rows(150, 4864)
    check_product(multiply(x, packed([weight])), x, weight)


@pytest.mark.parametrize("name", PACKABLE)
def test_rows_do_not_depend_on_their_batch(isa: str, name: str) -> None:
    linear = packed([make_weight(name, 75, 768)], torch.randn(75))
    x = random_rows(90, 768)
    whole = multiply(x, linear)
    for start, rows, threads in [
        (0, 1, 2),
        (89, 1, 1),
        (3, 2, 2),
        (5, 5, 1),
        (7, 6, 2),
        (40, 9, 1),
        (8, 16, 2),
        (1, 67, 1),
    ]:
        assert torch.equal(multiply(x[start : start + rows], linear, threads), whole[start : start + rows])


@pytest.mark.parametrize("name", PACKABLE)
def test_instruction_sets_agree_bitwise(name: str) -> None:
    linear = packed([make_weight(name, 40, 512)])
    x = random_rows(19, 512)
    results = []
    apart = ["generic"]  # it may lack fused multiply-add
    if name == "bf16":
        apart += ROUNDS_TO_BF16
    for isa_name in ISAS:
        if isa_name not in apart:
            assert library.select_isa(isa_name)
            results.append(multiply(x, linear))
    assert library.select_isa("")
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0", "q2_k", "q6_k", "bf16"])
def test_bad_values_stay_visible_and_in_their_row(isa: str, name: str, value: float) -> None:
    linear = packed([make_weight(name, 33, 256)])
    x = random_rows(12, 256)
    clean = multiply(x, linear)
    x[3, 100] = value
    y = multiply(x, linear)
    assert not y[3].isfinite().any()
    keep = torch.arange(12) != 3
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("name", ["q4_1", "q5_0", "q8_0", "q6_k", "f32"])
def test_zero_and_tiny_activations(isa: str, name: str) -> None:
    linear = packed([make_weight(name, 17, 256)])
    x = torch.zeros(3, 256)
    x[1] = 1e-38
    x[2, 5] = 1e-3
    y = multiply(x, linear)
    assert (y[0] == 0).all()
    assert (y[1].abs() < 1e-30).all()
    assert (y[2] != 0).any()


def test_parts_of_different_formats_share_an_input(isa: str) -> None:
    names = ["q4_1", "q4_1", "q6_k", "f16", "bf16", "q8_0", "q2_k"]
    sizes = [32, 19, 50, 7, 40, 16, 20]
    weights = [make_weight(name, n, 256, seed) for seed, (name, n) in enumerate(zip(names, sizes, strict=True))]
    bias = torch.randn(sum(sizes))
    linear = packed(weights, bias)
    assert (linear.out_features, linear.in_features) == (184, 256)
    for rows in (1, 11, 70):
        x = random_rows(rows, 256)
        alone = torch.cat([multiply(x, packed([weight])) for weight in weights], 1)
        assert torch.equal(multiply(x, linear), alone + bias)


def test_neighbours_of_one_format_become_one_matrix() -> None:
    weights = [make_weight("q4_0", n, 64, seed=n) for n in (32, 16, 24)]
    linear = packed(weights)
    assert len(linear.parts) == 1
    x = random_rows(4, 64)
    assert torch.equal(multiply(x, linear), torch.cat([multiply(x, packed([weight])) for weight in weights], 1))


@pytest.mark.parametrize("name", PACKABLE)
def test_embedding_gives_the_values_of_the_format(name: str) -> None:
    weight = make_weight(name, 45, 256)
    ids = torch.tensor([0, 44, 15, 16, 17, 0], dtype=torch.int32)
    values = weight.dequantize(torch.float32)[ids.long()]
    table = packed([weight])
    assert torch.equal(OPS[2].embedding(ids, table), values)
    assert torch.equal(OPS[2].embedding(ids, table, 0.5), values * 0.5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_unpacked_weights_are_multiplied_exactly(name: str) -> None:
    weight = make_weight(name, 37, 256)
    x = random_rows(5, 256)
    w = weight.dequantize(torch.float32).double()
    y = multiply(x, packed([weight], unpack=True))
    assert ((y - x.double() @ w.T).abs() <= 1e-6 * (x.abs().double() @ w.abs().T)).all()


def test_formats_without_kernels_are_left_to_the_caller() -> None:
    unknown = BlockFormat(35, lambda blocks: blocks.float())  # TQ2_0
    weight = Weight(unknown, (16, 256), {"data": torch.zeros(16, 66, dtype=torch.uint8)})
    assert pack([weight], None) is None
    assert pack([make_weight("q4_0", 16, 256), weight], None) is None


@pytest.mark.parametrize("name", PACKABLE)
def test_packing_adds_little(name: str) -> None:
    weight = make_weight(name, 64, 512)
    source = weight.num_bytes
    bias = torch.zeros(64)
    assert source <= packed([weight], bias).num_bytes - 4 * 64 <= 1.05 * source


def test_memory_goes_back_with_the_last_matrix() -> None:
    weights = [make_weight("q8_0", 512, 1024, seed) for seed in range(2)]
    linears = [packed([weight]) for weight in weights]
    owners = {id(part._owner): weakref.ref(part._owner) for linear in linears for part in linear.parts}
    x = random_rows(2, 1024)
    expected = multiply(x, linears[1])
    del linears[0]
    gc.collect()
    assert torch.equal(multiply(x, linears[0]), expected)
    # Other tests' matrices may live in the same chunk, so only a matrix of its own chunk proves the end.
    big = packed([make_weight("f32", 17 << 10, 1024)])
    owner = weakref.ref(big.parts[0]._owner)
    assert owner() is not None
    del big
    gc.collect()
    assert owner() is None
    assert all(ref() is not None for ref in owners.values())


@pytest.mark.parametrize(("rows", "k", "threads"), list(itertools.product((1, 2, 7, 16, 40), (32, 576, 4864), (1, 2))))
def test_nothing_outside_output_and_workspace_is_touched(rows: int, k: int, threads: int) -> None:
    linear = packed([make_weight("q4_0", 21, k), make_weight("f32", 7, k), make_weight("bf16", 3, k)])
    num_bytes = workspace_bytes(k, rows, threads)
    memory = torch.full((num_bytes + 4096,), 0xA5, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + 64
    x = random_rows(rows, k)
    y = torch.full((rows * 31 + 64,), 7.0)
    operation = instructions.Linear(
        code=instructions.Linear.opcode,
        barrier=0,
        linear=linear.address,
        x=x.data_ptr(),
        y=y[32:].data_ptr(),
        workspace=memory[start:].data_ptr(),
    )
    step = instructions.Step(num_tokens=rows)
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(operation))
    library.library().turbolm_run(OPS[threads].team.handle, addresses, 1, ctypes.byref(step))
    assert torch.equal(y[32 : 32 + rows * 31].view(rows, 31), multiply(x, linear))
    assert (y[:32] == 7).all() and (y[32 + rows * 31 :] == 7).all()
    assert (memory[:start] == 0xA5).all() and (memory[start + num_bytes :] == 0xA5).all()
