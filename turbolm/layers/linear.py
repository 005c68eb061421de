"""The one linear layer."""

from __future__ import annotations

from torch import Tensor

from turbolm.ops import Ops, PreparedLinear


class Linear:
    """y = x @ W.T + b; W may be several matrices stacked by output rows, in any formats."""

    def __init__(self, ops: Ops, weight: PreparedLinear) -> None:
        self.ops = ops
        self.weight = weight

    def __call__(self, x_tk: Tensor) -> Tensor:
        return self.ops.linear(x_tk, self.weight)
