"""GPTQ's packing against one written out word by word; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.quant import load_weight, read_packing
from turbolm.quant.gptq import Gptq
from turbolm.quant.int4 import int4

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.01}


def words_along(values: np.ndarray, axis: int, bits: int) -> torch.Tensor:
    """Whole words of values along an axis, the first one in the lowest bits."""
    per_word = 32 // bits
    values = np.moveaxis(values, axis, 0).astype(np.uint32)
    packed = np.zeros((values.shape[0] // per_word, values.shape[1]), dtype=np.uint32)
    for i, value in enumerate(values):
        packed[i // per_word] |= value << bits * (i % per_word)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, axis)).view(np.int32))


def random_parts(
    n: int, k: int, group: int, *, bits: int = 4, version: int = 1, order: str = "none", seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A module's tensors, and the matrix [n, k] that they mean."""
    rng = np.random.default_rng(seed)
    first = 2 - version
    codes = rng.integers(0, 1 << bits, (k, n))
    zeros = rng.integers(first, 16, (k // group, n)) if bits == 4 else np.full((k // group, n), 128)
    scales = rng.random((k // group, n)).astype(np.float16)
    groups = np.arange(k) // group
    groups = rng.permutation(groups) if order == "random" else groups
    matrix = (codes - zeros[groups]) * scales.astype(np.float32)[groups]
    parts = {
        "m.qweight": words_along(codes, 0, bits),
        "m.qzeros": words_along(zeros - first, 1, bits),
        "m.scales": torch.from_numpy(scales),
        "m.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return parts, torch.from_numpy(matrix.T.astype(np.float32))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["none", "random"])
@pytest.mark.parametrize(("k", "group"), [(64, 32), (256, 128), (96, 96)])
def test_load(source_of: Any, k: int, group: int, order: str, version: int) -> None:
    parts, matrix = random_parts(24, k, group, version=version, order=order)
    change = {"group_size": -1 if group == 96 else group, "checkpoint_format": ("gptq", "gptq_v2")[version - 1]}
    weight = load_weight(source_of(parts), "m", read_packing(CONFIG | change | {"desc_act": order == "random"}))
    assert (weight.format.name, weight.shape) == ("int4", (24, k))
    assert ("columns" in weight.tensors) == (order == "random" and group < k)
    assert torch.equal(weight.dequantize(torch.float32), matrix)


@pytest.mark.parametrize("version", [1, 2])
def test_eight_bits(source_of: Any, version: int) -> None:
    parts, matrix = random_parts(24, 64, 32, bits=8, version=version)
    weight = load_weight(source_of(parts), "m", Gptq(32, bits=8, version=version))
    assert weight.format.name == "int8"
    assert torch.equal(weight.dequantize(torch.float32), matrix)


def test_eight_bits_with_an_order_or_zero_points_are_refused(source_of: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"m: .*order of columns"):
        Gptq(32, bits=8).load(source_of(random_parts(24, 64, 32, bits=8, order="random")[0]), "m")
    with pytest.raises(UnsupportedModelError, match=r"m: .*zero points"):  # of the other version
        Gptq(32, bits=8, version=2).load(source_of(random_parts(24, 64, 32, bits=8)[0]), "m")


def test_a_module_without_g_idx(source_of: Any) -> None:
    parts, matrix = random_parts(8, 64, 32)
    del parts["m.g_idx"]
    assert torch.equal(Gptq(32).load(source_of(parts), "m").dequantize(torch.float32), matrix)
    with pytest.raises(CheckpointError, match=r"no tensor m\.g_idx"):
        Gptq(32, has_order=True).load(source_of(parts), "m")


def test_version_1_gives_back_what_a_zero_point_of_0_borrowed(source_of: Any) -> None:
    """GPTQModel takes 0x11111111 from whole words: 0 becomes 15, and the next zero point 1 less."""
    parts, _ = random_parts(8, 32, 32)
    zeros = [0, 8, 0, 0, 15, 1, 0, 7]
    word = sum(zero << 4 * i for i, zero in enumerate(zeros)) - 0x11111111
    parts["m.qzeros"] = torch.tensor([[word]], dtype=torch.int32)
    assert Gptq(32).load(source_of(parts), "m").tensors["zeros"].flatten().tolist() == zeros


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 4), groups=st.integers(1, 3), version=st.sampled_from([1, 2]), has_order=st.booleans())
def test_what_is_packed_is_loaded_again(source_of: Any, n: int, groups: int, version: int, has_order: bool) -> None:
    n, k, group = 8 * n, 32 * groups, 32
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    zeros = torch.randint(2 - version, 16, (n, groups), dtype=torch.uint8)
    weight = int4(codes, torch.rand(n, groups).half(), zeros, torch.randperm(k) if has_order else None)
    packing = Gptq(group, version=version, has_order=has_order)
    loaded = packing.load(source_of(packing.pack("m", weight)), "m")
    assert torch.equal(loaded.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert torch.equal(loaded.tensors["zeros"], zeros)


def test_the_config_that_is_written_is_read_again() -> None:
    for packing in (Gptq(32), Gptq(-1, version=2, has_order=True)):
        assert read_packing(packing.quantization_config()) == packing


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 3}, "'bits'.*3"),
        ({"bits": 2}, "'bits'.*2"),
        ({"group_size": 33}, "'group_size'.*33"),
        ({"checkpoint_format": "marlin"}, "'checkpoint_format'.*marlin"),
        ({"format": "bitblas"}, "'format'.*bitblas"),
        ({"is_marlin_format": True}, "'is_marlin_format'"),
        ({"dynamic": {"+:.*up.*": {"bits": 8}}}, "'dynamic'"),
        ({"desc_act": 1}, "'desc_act'"),
        ({"adapter": {"rank": 8}}, "'adapter'"),
    ],
)
def test_variants_that_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"gptq.*{named}"):
        read_packing(CONFIG | change)


def test_fields_that_are_switched_off_or_say_nothing() -> None:
    silent = {"is_marlin_format": False, "adapter": None, "dynamic": {"-:.*head.*": {}}, "meta": {"quantizer": "x"}}
    assert read_packing(CONFIG | silent) == Gptq(32)


@pytest.mark.parametrize(
    ("group", "change", "named"),
    [
        (64, {}, r"m\.scales is F16 \[2, 24\].*\[1, 24\].*groups of 64"),
        (32, {"m.scales": None}, r"no tensor m\.scales"),
        (32, {"m.qzeros": torch.zeros(2, 4, dtype=torch.int32)}, r"m\.qzeros"),
        (32, {"m.qweight": torch.zeros(8, 24)}, r"m\.qweight is F32"),
        (32, {"m.qweight": torch.zeros(8, 20, dtype=torch.int32)}, r"m\.qweight has 20 rows"),
        (32, {"m.g_idx": torch.zeros(64, dtype=torch.int32)}, r"m\.g_idx must put 64 columns into 2 groups of 32"),
        (32, {"m.g_idx": torch.full((64,), 9, dtype=torch.int32)}, r"m\.g_idx must"),
        (32, {"m.g_idx": torch.zeros(63, dtype=torch.int32)}, r"m\.g_idx is I32 \[63\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(source_of: Any, group: int, change: dict[str, Any], named: str) -> None:
    parts = random_parts(24, 64, 32)[0] | change
    source = source_of({name: tensor for name, tensor in parts.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=named):
        Gptq(group).load(source, "m")


def test_matrices_that_the_packing_can_not_hold() -> None:
    codes, scales = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2).half()
    zeros = torch.zeros(8, 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"zero points 0\.\.0; version 1.*1\.\.15"):
        Gptq(32).pack("m", int4(codes, scales, zeros))
    with pytest.raises(ConfigError, match=r"zero points 16\.\.16; version 2.*0\.\.15"):
        Gptq(32, version=2).pack("m", int4(codes, scales, zeros + 16))
    with pytest.raises(ConfigError, match="m has groups of 32, not -1"):
        Gptq(-1).pack("m", int4(codes, scales, zeros + 8))
    with pytest.raises(ConfigError, match="can't pack"):
        Gptq(32).pack("m", int4(codes, scales, zeros + 8, torch.randperm(64)))
