"""What each method makes of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.compress.awq import scale_layer
from turbolm.compress.gptq import gptq
from turbolm.compress.grid import Grid, full_range, round_matrix, search_grid
from turbolm.compress.layer import LayerTensors, Point
from turbolm.compress.recipe import Recipe
from turbolm.compress.report import MatrixReport
from turbolm.compress.smooth import rounded_error, smooth_layer
from turbolm.compress.statistics import Statistics, relative_error
from turbolm.quant.rounding import round_weight
from turbolm.weights import Weight

UNREACHED = "no calibration token came this way, so rounded to the nearest"
NOT_FINITE = "some inputs were NaN or infinite, and left out"
DEAD = "some input channels are zero in all of the calibration data"
FEW = "fewer calibration tokens than input columns, so GPTQ knows too little: give more samples"
SINGULAR = "GPTQ's Hessian is singular, so rounded to the nearest: give more, or more varied, samples"


@dataclass(frozen=True, slots=True)
class CompressedLayer:
    weights: dict[str, Weight]  # by module
    reports: list[MatrixReport]


def compress_layer(
    layer: LayerTensors, statistics: dict[str, Statistics] | None, recipe: Recipe, dtype: torch.dtype
) -> CompressedLayer:
    """Quantize a layer's matrices. `layer` and `statistics` are changed where the method scales channels; norms
    and biases are stored in `dtype`. Without statistics every method rounds to the nearest."""
    scale_dtype = dtype if recipe.file_format == "compressed-tensors" else torch.float16
    grid = Grid(recipe.group_size, recipe.symmetric, scale_dtype)
    plain = {point.name: _plain(layer, point, recipe, grid) for point in layer.points}
    before = {point.name: _errors(layer, point, statistics, recipe, plain[point.name]) for point in layer.points}
    if statistics is not None and recipe.method == "awq":
        scale_layer(layer, statistics, grid, dtype)
    if statistics is not None and recipe.method == "int8":
        smooth_layer(layer, statistics, dtype)
    weights: dict[str, Weight] = {}
    reports = []
    for point in layer.points:
        notes: list[str] = []
        rounded, after = plain[point.name], before[point.name]
        if statistics is not None and recipe.needs_data:
            rounded = _calibrated(layer, point, statistics[point.name], recipe, grid, notes)
            after = _errors(layer, point, statistics, recipe, rounded)
        num_tokens = 0 if statistics is None else statistics[point.name].num_tokens
        for module, plain_error, error in zip(point.modules, before[point.name], after, strict=True):
            reports.append(MatrixReport(module, plain_error, error, num_tokens, tuple(notes)))
        weights |= zip(point.modules, rounded, strict=True)
    return CompressedLayer(weights, reports)


def _calibrated(
    layer: LayerTensors, point: Point, found: Statistics, recipe: Recipe, grid: Grid, notes: list[str]
) -> list[Weight]:
    """The point's matrices, scaled by now, by the recipe's method; what went wrong goes to `notes`."""
    notes += _notes(found, recipe)
    if not found.num_tokens or recipe.method == "int8":
        return _plain(layer, point, recipe, grid)
    matrix, sizes = _stacked(layer, point)
    if recipe.method == "awq":
        return round_matrix(matrix, *search_grid(matrix, found.gram, grid)).weights(sizes, grid.scale_dtype)
    result = gptq(matrix, found.gram, grid, recipe.order, recipe.damping)
    if result is not None:
        return result.weights(sizes, grid.scale_dtype)
    notes.append(SINGULAR)
    return _plain(layer, point, recipe, grid)


def _plain(layer: LayerTensors, point: Point, recipe: Recipe, grid: Grid) -> list[Weight]:
    """Rounded to the nearest."""
    if recipe.weight_format != "int4":
        return [round_weight(layer.matrices[module], recipe.weight_format) for module in point.modules]
    matrix, sizes = _stacked(layer, point)
    groups = matrix.view(matrix.shape[0], -1, grid.width(matrix.shape[1]))
    return round_matrix(matrix, *full_range(groups, grid)).weights(sizes, grid.scale_dtype)


def _stacked(layer: LayerTensors, point: Point) -> tuple[Tensor, list[int]]:
    """The point's matrices by rows, and how many rows each has."""
    matrices = [layer.matrices[module] for module in point.modules]
    return torch.cat(matrices), [matrix.shape[0] for matrix in matrices]


def _errors(
    layer: LayerTensors,
    point: Point,
    statistics: dict[str, Statistics] | None,
    recipe: Recipe,
    weights: list[Weight],
) -> list[float]:
    """Each matrix's relative error: with rounded activations too where the method is for those."""
    found = None if statistics is None or not statistics[point.name].num_tokens else statistics[point.name]
    pairs = [
        (layer.matrices[module], weight.dequantize(torch.float32))
        for module, weight in zip(point.modules, weights, strict=True)
    ]
    if found is not None and recipe.method == "int8":
        return [rounded_error(found.sampled(), *pair) for pair in pairs]
    return [relative_error(*pair, None if found is None else found.gram) for pair in pairs]


def _notes(found: Statistics, recipe: Recipe) -> list[str]:
    if not found.num_tokens:
        return [UNREACHED]
    notes = [NOT_FINITE] if found.num_dropped else []
    if found.num_dead:
        notes.append(DEAD)
    if recipe.method == "gptq" and found.num_tokens < found.gram.shape[0]:
        notes.append(FEW)
    return notes
