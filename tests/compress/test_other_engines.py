"""transformers reads what is written here, and turbolm what it writes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from turbolm.compress import quantize

SEQUENCE = tuple(range(5, 60))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"method": "rtn", "symmetric": True, "group_size": 32, "format": "compressed-tensors"}, 2e-3),
        ({"method": "awq", "symmetric": True, "group_size": 32, "format": "compressed-tensors"}, 2e-3),
        ({"method": "int8"}, 0.2),  # activations are rounded there
        ({"method": "fp8"}, 0.4),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_compressed_tensors_there_and_back(tiny_model, tmp_path, data_file, logits, options, most):
    data = {"data": str(data_file), "context": 64} if options["method"] in ("awq", "int8") else {}
    quantize(str(tiny_model()), tmp_path / "ours", **options, **data)
    expected = logits(tmp_path / "ours", [SEQUENCE])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        found = model(torch.tensor([SEQUENCE])).logits[0]
    assert (found - expected).abs().max() < most * expected.abs().max()
    again = logits(tmp_path / "theirs", [SEQUENCE])
    assert (again - expected).abs().max() < 1e-2 * expected.abs().max()
