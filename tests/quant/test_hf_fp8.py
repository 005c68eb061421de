"""fp8 checkpoints of transformers, DeepSeek and AutoFP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.quant import load_weight, read_packing

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
PLAIN = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


def parts(scale: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"m.weight": torch.randn(200, 300).to(torch.float8_e4m3fn), f"m.{scale}": torch.rand(shape)}


def test_blocks(source_of: Any) -> None:
    tensors = parts("weight_scale_inv", (2, 3))
    weight = load_weight(source_of(tensors), "m", read_packing(BLOCKS))
    scales = tensors["m.weight_scale_inv"].repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert weight.format.name == "fp8"
    assert torch.equal(weight.dequantize(torch.float32), tensors["m.weight"].float() * scales)


@pytest.mark.parametrize("shape", [(), (1,), (200,), (200, 1)])
def test_one_scale_per_matrix_or_row(source_of: Any, shape: tuple[int, ...]) -> None:
    tensors = parts("weight_scale", shape) | {"m.input_scale": torch.tensor(0.125)}
    weight = load_weight(source_of(tensors), "m", read_packing(PLAIN))
    assert weight.tensors["input_scale"] == 0.125
    expected = tensors["m.weight"].float() * tensors["m.weight_scale"].reshape(-1, 1)
    assert torch.equal(weight.dequantize(torch.float32), expected)


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        (BLOCKS, parts("weight_scale_inv", (2, 2)), r"m\.weight_scale_inv is F32 \[2, 2\].*\[2, 3\]"),
        (BLOCKS, parts("other", (2, 3)), r"no tensor m\.weight_scale"),
        (PLAIN, parts("weight_scale", (2, 3)), r"m\.weight_scale is F32 \[2, 3\].*\[200, 1\]"),
        (PLAIN, parts("weight_scale", ()) | {"m.input_scale": torch.ones(3)}, r"m\.input_scale is F32 \[3\]"),
        (PLAIN, {"m.weight": torch.zeros(8).to(torch.float8_e4m3fn)}, r"m\.weight has shape \[8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(source_of: Any, config: Any, tensors: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_weight(source_of(tensors), "m", read_packing(config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_block_size": [64, 64]}, "weight_block_size"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"activation_scheme": "made_up"}, "activation_scheme"),
        ({"rotated": True}, "rotated"),
    ],
)
def test_variants_that_are_refused_by_name(change: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"fp8.*'{named}'"):
        read_packing(BLOCKS | change)
