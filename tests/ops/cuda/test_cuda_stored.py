"""Matrices that are stored and restored, on the host, are what was prepared."""

from __future__ import annotations

import pytest
import torch

from turbolm.errors import CheckpointError
from turbolm.ops.cuda.stored import CudaLayout
from turbolm.ops.sharded import PartialLinear
from turbolm.ops.stored import StoredLinear
from turbolm.quant.dense import dense
from turbolm.quant.rounding import round_weight

LAYOUT = CudaLayout()
OPS = LAYOUT.make_ops(torch.bfloat16, 1, 0, 1)


@pytest.mark.parametrize("kind", ["bf16", "int4", "int8", "fp8"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_partial", [False, True])
def test_stored_and_restored(kind: str, has_bias: bool, is_partial: bool) -> None:
    matrix = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    weight = dense(matrix.bfloat16()) if kind == "bf16" else round_weight(matrix, kind)  # type: ignore[arg-type]
    linear = OPS.prepare_linear([weight, weight], torch.arange(96.0) if has_bias else None)
    stored = LAYOUT.store(PartialLinear(linear) if is_partial else linear)
    again = LAYOUT.restore(stored, OPS)
    assert isinstance(again, PartialLinear) == is_partial
    again = again.inner if isinstance(again, PartialLinear) else again
    assert type(again) is type(linear)
    assert (again.out_features, again.in_features, again.num_bytes) == (96, 256, linear.num_bytes)
    expected = LAYOUT.store(linear).tensors
    for name, tensor in LAYOUT.store(again).tensors.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
    assert ("bias" in expected) == has_bias


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(CheckpointError, match="'int3' are unknown"):
        LAYOUT.restore(StoredLinear({"kind": "int3"}, {}), OPS)
    assert len(LAYOUT.fingerprint) == 16
