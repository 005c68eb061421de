"""compressed-tensors' layouts against ones written out; schemes by module; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.quant import load_weight, read_packing
from turbolm.quant.compressed_scheme import Scheme
from turbolm.quant.compressed_tensors import CompressedTensors
from turbolm.quant.fp8 import fp8
from turbolm.quant.int4 import int4
from turbolm.quant.int8 import int8

# As llm-compressor writes it.
CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.12.2",
}  # fmt: skip
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def changed(weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """CONFIG with other fields of the weights, of their group, and of the whole."""
    config = copy.deepcopy(CONFIG) | top
    config["config_groups"]["group_0"] |= group or {}
    config["config_groups"]["group_0"]["weights"] |= weights or {}
    return config


W8A8 = changed(
    {"num_bits": 8, "strategy": "channel", "group_size": None},
    {"format": "int-quantized", "input_activations": ACTIVATIONS},
    format="int-quantized",
)
FP8 = changed(
    {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None},
    {"format": "float-quantized", "input_activations": ACTIVATIONS | {"type": "float"}},
)
FP8_BLOCKS = changed(
    {"num_bits": 8, "type": "float", "strategy": "block", "group_size": None, "block_structure": [128, 128]},
    {"format": "float-quantized"},
)


def words_along(signed: np.ndarray, axis: int, bits: int) -> torch.Tensor:
    """Signed codes as words, offset to be positive; the last word is filled with zeros."""
    values = np.moveaxis(signed, axis, 0) + (1 << bits - 1)
    per_word = 32 // bits
    packed = np.zeros((-(-values.shape[0] // per_word), values.shape[1]), dtype=np.uint32)
    for i, value in enumerate(values.astype(np.uint32)):
        packed[i // per_word] |= value << bits * (i % per_word)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, axis)).view(np.int32))


def random_parts(
    n: int, k: int, group: int, *, bits: int = 4, is_symmetric: bool = True, order: np.ndarray | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A packed module's tensors, and the matrix that they mean."""
    rng = np.random.default_rng(n + k)
    half = 1 << bits - 1
    codes = rng.integers(-half, half, (n, k))
    zeros = rng.integers(-half, half, (n, k // group)) * (not is_symmetric)
    scales = rng.random((n, k // group)).astype(np.float32)
    groups = np.arange(k) // group if order is None else order
    parts = {
        "m.weight_packed": words_along(codes, 1, bits),
        "m.weight_scale": torch.from_numpy(scales).bfloat16(),
        "m.weight_shape": torch.tensor([n, k]),
    }
    if not is_symmetric:
        parts["m.weight_zero_point"] = words_along(zeros, 0, bits)
    if order is not None:
        parts["m.weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    rounded = torch.from_numpy(scales).bfloat16().float()
    return parts, torch.from_numpy((codes - zeros[:, groups]).astype(np.float32)) * rounded[:, groups]


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(24, 64, 32), (21, 256, 128), (3, 36, 36)])
def test_pack_quantized(source_of: Any, n: int, k: int, group: int, is_symmetric: bool) -> None:
    parts, matrix = random_parts(n, k, group, is_symmetric=is_symmetric)
    strategy = {"strategy": "channel", "group_size": None} if group == k else {"group_size": group}
    weight = load_weight(source_of(parts), "m", read_packing(changed(strategy | {"symmetric": is_symmetric})))
    assert (weight.format.name, weight.shape) == ("int4", (n, k))
    assert torch.equal(weight.dequantize(torch.float32), matrix)


def test_activation_order(source_of: Any) -> None:
    order = np.random.default_rng(0).permutation(np.arange(128) // 32)
    parts, matrix = random_parts(8, 128, 32, is_symmetric=False, order=order)
    packing = read_packing(changed({"symmetric": False, "actorder": "group"}))
    assert packing.has_order
    assert torch.equal(load_weight(source_of(parts), "m", packing).dequantize(torch.float32), matrix)
    unset = random_parts(8, 128, 32)[0] | {"m.weight_g_idx": torch.full((128,), -1, dtype=torch.int32)}
    assert "columns" not in load_weight(source_of(unset), "m", read_packing(CONFIG)).tensors


def test_eight_bits_packed(source_of: Any) -> None:
    parts, matrix = random_parts(8, 64, 32, bits=8)
    weight = load_weight(source_of(parts), "m", read_packing(changed({"num_bits": 8})))
    assert weight.format.name == "int8"
    assert torch.equal(weight.dequantize(torch.float32), matrix)


def test_int_quantized(source_of: Any) -> None:
    codes, scales = torch.randint(-128, 128, (6, 10), dtype=torch.int8), torch.rand(6, 1)
    source = source_of({"m.weight": codes, "m.weight_scale": scales})
    weight = load_weight(source, "m", read_packing(W8A8))
    assert weight.format.name == "int8"
    assert torch.equal(weight.dequantize(torch.float32), codes.float() * scales)


@pytest.mark.parametrize(
    ("config", "scale_shape", "block"),
    [(FP8, (200, 1), (1, 300)), (FP8, (1,), (200, 300)), (FP8_BLOCKS, (2, 3), (128, 128))],
)
def test_float_quantized(source_of: Any, config: Any, scale_shape: tuple[int, ...], block: tuple[int, int]) -> None:
    codes, scales = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(scale_shape)
    source = source_of({"m.weight": codes, "m.weight_scale": scales, "m.input_scale": torch.tensor([0.25])})
    weight = load_weight(source, "m", read_packing(config))
    assert (weight.format.name, weight.tensors["input_scale"]) == ("fp8", 0.25)
    full = scales.reshape(-1, scales.shape[-1] if scales.dim() == 2 else 1)
    full = full.repeat_interleave(block[0], 0)[:200].repeat_interleave(block[1], 1)[:, :300]
    assert torch.equal(weight.dequantize(torch.float32), codes.float() * full)


def test_each_module_has_its_own_scheme() -> None:
    eight = W8A8["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$", "model.layers.0.mlp.up_proj"]}
    config = changed(ignore=["lm_head", "re:.*layers\\.7\\..*"], format="mixed-precision")
    config["config_groups"]["group_1"] = eight
    packing = CompressedTensors.read_config(config)
    assert packing.formats == ("int4", "int8")
    assert packing.scheme_of("model.layers.3.self_attn.q_proj").format == "int4"
    assert packing.scheme_of("model.layers.3.mlp.down_proj").format == "int8"
    assert packing.scheme_of("model.layers.0.mlp.up_proj").format == "int8"
    for left_out in ("lm_head", "model.layers.7.mlp.down_proj"):
        with pytest.raises(CheckpointError, match=rf"{left_out} is stored quantized.*ignore"):
            packing.scheme_of(left_out)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 20), groups=st.integers(1, 3), is_symmetric=st.booleans())
def test_what_is_packed_is_loaded_again(source_of: Any, n: int, groups: int, is_symmetric: bool) -> None:
    k = 32 * groups
    zeros = torch.full((n, groups), 8) if is_symmetric else torch.randint(0, 16, (n, groups))
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    for weight, group in (
        (int4(codes, torch.rand(n, groups).half(), zeros.to(torch.uint8)), 32),
        (int8(torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n, 1)), -1),
        (fp8(torch.randn(n, k).to(torch.float8_e4m3fn), torch.rand(n, 1), torch.tensor(0.5)), -1),
    ):
        packing = CompressedTensors((Scheme(("Linear",), weight.format.name, group, is_symmetric),))  # type: ignore[arg-type]
        loaded = packing.load(source_of(packing.pack("m", weight)), "m")
        assert loaded.format is weight.format
        assert loaded.tensors.keys() == weight.tensors.keys()
        assert all(torch.equal(loaded.tensors[name].float(), tensor.float()) for name, tensor in weight.tensors.items())


def test_the_config_that_is_written_is_read_again() -> None:
    for scheme in (
        Scheme(("Linear",), "int4", 128, is_symmetric=False),
        Scheme(("Linear",), "int4"),
        Scheme(("re:.*q_proj", "a.b"), "int8", activations="dynamic"),
        Scheme(("Linear",), "fp8", activations="static"),
        Scheme(("Linear",), "fp8", has_blocks=True, activations="dynamic"),
    ):
        packing = CompressedTensors((scheme,), ("lm_head",))
        assert read_packing(packing.quantization_config()) == packing
    both = CompressedTensors((Scheme(("a",), "int4", 32), Scheme(("Linear",), "int8")))
    assert both.quantization_config()["format"] == "mixed-precision"
    assert read_packing(both.quantization_config()) == both


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (changed({"num_bits": 2}), "group_0, weights has 'num_bits'.*2"),
        (changed({"type": "float", "strategy": "channel"}), "'num_bits'.*4"),
        (changed({"strategy": "tensor_group"}), "'strategy'.*tensor_group"),
        (changed({"group_size": 7}), "'group_size'.*7"),
        (changed({"num_bits": 8, "symmetric": False}), "'symmetric'"),
        (
            changed({"strategy": "block", "type": "float", "num_bits": 8, "block_structure": [64, 64]}),
            "'block_structure'",
        ),
        (changed({"actorder": "made_up"}), "'actorder'"),
        (changed({"noise": 1}), "field 'noise'"),
        (changed(group={"format": "nvfp4-pack-quantized"}), "'format'.*nvfp4"),
        (changed(group={"format": "marlin-24"}), "'format'.*marlin-24"),
        (changed(group={"format": "int-quantized"}), "'format'.*int-quantized"),
        (changed(group={"output_activations": ACTIVATIONS}), "'output_activations'"),
        (changed(group={"input_activations": ACTIVATIONS | {"num_bits": 4}}), "input_activations has 'num_bits'"),
        (changed(group={"targets": ["re:("]}), "'targets'"),
        (changed(ignore="lm_head"), "'ignore'"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config has 'format'"),
        (changed(transform_config={"config_groups": {"R1": {}}}), "field 'transform_config'"),
        (changed(quantization_status="calibration"), "'quantization_status'"),
    ],
)
def test_variants_that_are_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"compressed-tensors.*{named}"):
        read_packing(config)


@pytest.mark.parametrize("groups", [{}, None, [], {"group_0": None}, {"group_0": {"targets": ["Linear"]}}])
def test_broken_groups(groups: Any) -> None:
    with pytest.raises(CheckpointError, match="broken"):
        read_packing(CONFIG | {"config_groups": groups})


def test_scales_of_the_kv_cache_are_left_out_loudly(caplog: pytest.LogCaptureFixture) -> None:
    read_packing(CONFIG | {"kv_cache_scheme": {"num_bits": 8}})
    assert "KV cache are not used" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"m.weight_scale": None}, r"no tensor m\.weight_scale"),
        ({"m.weight_scale": torch.ones(24, 1)}, r"m\.weight_scale is F32 \[24, 1\].*\[24, 2\].*groups of 32"),
        ({"m.weight_scale": torch.full((24, 2), torch.inf)}, r"m\.weight_scale holds"),
        ({"m.weight_shape": None}, r"no tensor m\.weight_shape"),
        ({"m.weight_shape": torch.tensor([24, 96])}, r"m\.weight_packed has shape \[24, 8\].*\[24, 96\]"),
        ({"m.weight_packed": torch.zeros(24, 8)}, r"m\.weight_packed is F32"),
        (
            {"m.weight_packed": None, "m.weight": torch.zeros(4, 64, dtype=torch.int8)},
            r"m\.weight is not stored as.*int4",
        ),
        (
            {"m.weight_packed": None, "m.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn)},
            r"m\.weight is not stored as.*int4",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(source_of: Any, change: dict[str, Any], named: str) -> None:
    parts = random_parts(24, 64, 32)[0] | change
    source = source_of({name: tensor for name, tensor in parts.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=named):
        load_weight(source, "m", read_packing(CONFIG))


def test_a_zero_point_that_is_missing(source_of: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor m\.weight_zero_point"):
        load_weight(source_of(random_parts(24, 64, 32)[0]), "m", read_packing(changed({"symmetric": False})))


def test_matrices_that_a_scheme_does_not_describe() -> None:
    weight = int4(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2), torch.full((8, 2), 16, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="m is int4, its scheme int8"):
        CompressedTensors((Scheme(("Linear",), "int8"),)).pack("m", weight)
    with pytest.raises(ConfigError, match=r"groups of 32.*scheme has groups of 64"):
        CompressedTensors((Scheme(("Linear",), "int4", 64),)).pack("m", weight)
    with pytest.raises(ConfigError, match=r"zero point 16.*0\.\.15"):
        CompressedTensors((Scheme(("Linear",), "int4", 32, is_symmetric=False),)).pack("m", weight)
    with pytest.raises(ConfigError, match="zero points other than 8"):
        CompressedTensors((Scheme(("Linear",), "int4", 32),)).pack("m", weight)
