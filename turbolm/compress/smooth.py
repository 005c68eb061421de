"""SmoothQuant: large activations are made smaller, and the weights that they meet larger, so that both survive
8 bits.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438). Its strength is searched here for each input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.compress.layer import LayerTensors, Point
from turbolm.compress.statistics import Statistics

_STRENGTHS = tuple(step / 10 for step in range(3, 10))
_MAX_ROWS = 256  # of each matrix that the search looks at


def smooth_layer(layer: LayerTensors, statistics: dict[str, Statistics], dtype: torch.dtype) -> None:
    """Search each point's scales, and fold them in: into norms, which are stored in `dtype`, or the matrix before."""
    for point in layer.points:
        found = statistics[point.name]
        if found.num_tokens:
            scales = _search_scales(layer, point, found)
            if scales is not None:
                found.scale(layer.fold(point, scales, dtype))


def round_rows(values: Tensor) -> Tensor:
    """Each row to int8 with a scale of its own, and back."""
    scales = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (values / scales).round_().clamp_(-127, 127) * scales


def rounded_error(x_tk: Tensor, matrix_nk: Tensor, rounded_nk: Tensor) -> float:
    """‖W' x' - W x‖² / ‖W x‖², x' being x in 8 bits."""
    exact = x_tk @ matrix_nk.T
    delta = round_rows(x_tk) @ rounded_nk.T - exact
    return float(delta.square().sum() / exact.square().sum().clamp(min=1e-30))


def _search_scales(layer: LayerTensors, point: Point, statistics: Statistics) -> Tensor | None:
    """Scales [j] of the point's input; None: no scales are better."""
    producer = point.producer
    matrices = [layer.matrices[module] for module in point.modules]
    activation = producer.reduce(statistics.max_abs)
    weight = producer.reduce(torch.stack([matrix.abs().amax(0) for matrix in matrices]).amax(0))
    alive = (activation > 0) & (weight > 0)
    sampled = [matrix[:: -(-matrix.shape[0] // _MAX_ROWS)] for matrix in matrices]
    x_tk = statistics.sampled()
    exact = [x_tk @ matrix.T for matrix in sampled]
    best, best_scales = _loss(sampled, exact, x_tk, None), None
    for strength in _STRENGTHS:
        scales = activation.pow(strength) / weight.pow(1 - strength)
        scales = torch.where(alive, scales.clamp(min=1e-5), 1.0)
        loss = _loss(sampled, exact, x_tk, producer.expand(scales))
        if loss < best:
            best, best_scales = loss, scales
    return best_scales


def _loss(matrices: list[Tensor], exact: list[Tensor], x_tk: Tensor, scales_k: Tensor | None) -> float:
    """The sum of the outputs' relative errors with 8-bit weights and activations."""
    x = round_rows(x_tk if scales_k is None else x_tk / scales_k)
    total = 0.0
    for matrix, output in zip(matrices, exact, strict=True):
        weight = round_rows(matrix if scales_k is None else matrix * scales_k)
        total += float((x @ weight.T - output).square().sum() / output.square().sum().clamp(min=1e-30))
    return total
