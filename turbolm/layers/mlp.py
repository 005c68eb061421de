"""The gated feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from turbolm.layers.linear import Linear
from turbolm.ops import Activation, Ops


class GatedMlp:
    """down(activation(gate(x)) * up(x)); gate and up are one merged matrix."""

    def __init__(self, ops: Ops, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self.ops = ops
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(self, x_th: Tensor, adapters_t: Tensor | None) -> Tensor:
        return self.down(self.ops.activate_multiply(self.gate_up(x_th, adapters_t), self.activation), adapters_t)
