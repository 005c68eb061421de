"""AWQ: channels whose inputs are large get finer weights, by scales that the layer before takes back; then the
range of each group is clipped where that helps.

Source: Lin et al., AWQ (arXiv 2306.00978), and AutoAWQ's form of the scales. Unlike there, the error that the
search measures is that of the linear layers' outputs over all calibration tokens, from the Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.compress.grid import Grid, full_range, nearest_values
from turbolm.compress.layer import LayerTensors, Point
from turbolm.compress.statistics import Statistics, output_power

_STEPS = 20  # of the exponent between 0 and 1
_MAX_ROWS = 256  # of each matrix that the search looks at


def scale_layer(layer: LayerTensors, statistics: dict[str, Statistics], grid: Grid, dtype: torch.dtype) -> None:
    """Search each point's scales, and fold them in: into norms, which are stored in `dtype`, or the matrix before."""
    for point in layer.points:
        found = statistics[point.name]
        if found.num_tokens:
            scales = search_scales(layer, point, found, grid)
            if scales is not None:
                found.scale(layer.fold(point, scales, dtype))


def search_scales(layer: LayerTensors, point: Point, statistics: Statistics, grid: Grid) -> Tensor | None:
    """Scales [j] of the point's input; None: no scales are better."""
    producer = point.producer
    matrices = [layer.matrices[module] for module in point.modules]
    activation = producer.reduce(statistics.mean_abs)
    weight = producer.reduce(_relative_weights(matrices, grid))
    alive = (activation > 0) & (weight > 0)
    sampled = [matrix[:: -(-matrix.shape[0] // _MAX_ROWS)] for matrix in matrices]
    powers = [float(output_power(matrix, statistics.gram)) for matrix in sampled]
    best, best_scales = _loss(sampled, powers, None, statistics.gram, grid), None
    for with_weights in (True, False):
        for step in range(_STEPS):
            ratio = step / _STEPS if with_weights else (step + 1) / _STEPS
            scales = activation.pow(ratio) / (weight.pow(1 - ratio) if with_weights else 1.0)
            scales = torch.where(alive, scales.clamp(min=1e-4), 1.0)
            scales = torch.where(alive, scales / (scales[alive].max() * scales[alive].min()).sqrt(), 1.0)
            loss = _loss(sampled, powers, producer.expand(scales), statistics.gram, grid)
            if loss < best:
                best, best_scales = loss, scales
    return best_scales


def _relative_weights(matrices: list[Tensor], grid: Grid) -> Tensor:
    """[k]: the mean over rows of |weight| / the largest of its group."""
    total = torch.zeros(matrices[0].shape[1], device=matrices[0].device)
    for matrix in matrices:
        n, k = matrix.shape
        groups = matrix.abs().view(n, -1, grid.width(k))
        total += (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).view(n, k).sum(0)
    return total / sum(matrix.shape[0] for matrix in matrices)


def _loss(matrices: list[Tensor], powers: list[float], scales_k: Tensor | None, gram_kk: Tensor, grid: Grid) -> float:
    """The sum of the matrices' relative errors when they are rounded after scaling."""
    total = 0.0
    for matrix, power in zip(matrices, powers, strict=True):
        scaled = matrix if scales_k is None else matrix * scales_k
        groups = scaled.view(matrix.shape[0], -1, grid.width(matrix.shape[1]))
        scales, zeros = full_range(groups, grid)
        rounded = nearest_values(groups, scales.unsqueeze(2), zeros.unsqueeze(2)).view(matrix.shape)
        delta = (rounded if scales_k is None else rounded / scales_k) - matrix
        total += float(output_power(delta, gram_kk)) / max(power, 1e-30)
    return total
