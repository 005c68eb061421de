"""AWQ's and SmoothQuant's scales, and what a layer becomes by each method."""

from __future__ import annotations

import pytest
import torch

from turbolm.compress.awq import scale_layer
from turbolm.compress.calibration import Calibration, RecordingOps
from turbolm.compress.grid import Grid
from turbolm.compress.layer import LayerTensors
from turbolm.compress.methods import DEAD, FEW, UNREACHED, compress_layer
from turbolm.compress.recipe import Recipe
from turbolm.compress.samples import Samples
from turbolm.compress.smooth import round_rows, smooth_layer
from turbolm.compress.statistics import Statistics
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec


@pytest.fixture
def observed(tiny_model, tmp_path):
    """The first layer of a tiny model, and the statistics of 300 tokens."""
    checkpoint = open_checkpoint(tiny_model())
    spec = decoder_spec(checkpoint.config)
    generator = torch.Generator().manual_seed(3)
    samples = Samples(tuple(tuple(torch.randint(0, 256, (100,), generator=generator).tolist()) for _ in range(3)), "")
    ops = RecordingOps(torch.device("cpu"), torch.float32)
    calibration = Calibration(spec, checkpoint.source, samples, ops, tmp_path)
    calibration.embed()
    layer = LayerTensors.read(spec.layers[0], checkpoint.source, ops.device)
    return layer, calibration.observe(0, layer)


def mean_error(compressed):
    return sum(report.error for report in compressed.reports) / len(compressed.reports)


@pytest.mark.parametrize("method", ["awq", "gptq", "int8"])
def test_every_matrix_is_at_least_as_close_as_rounded_plainly(observed, method):
    layer, statistics = observed
    group_size = 32 if method != "int8" else 0
    done = compress_layer(layer, statistics, Recipe(method, group_size=group_size), torch.bfloat16)
    assert [report.name for report in done.reports] == list(done.weights)
    assert len(done.weights) == 7
    plain = sum(report.plain_error for report in done.reports) / 7
    assert mean_error(done) < 0.8 * plain
    for report in done.reports:
        assert report.num_tokens == 300
        module = report.name
        exact = layer.matrices[module]
        assert done.weights[module].shape == exact.shape


def test_awq_scales_large_channels_up(observed):
    layer, statistics = observed
    before = {name: matrix.clone() for name, matrix in layer.matrices.items()}
    scale_layer(layer, statistics, Grid(32, False, torch.float16), torch.float32)
    ratio = (layer.matrices["model.layers.0.mlp.up_proj"] / before["model.layers.0.mlp.up_proj"]).median(0).values
    large = torch.zeros(64, dtype=torch.bool)
    large[::9] = True  # the norm's large channels
    assert ratio[large].min() > ratio[~large].mean()


def test_smoothing_helps_8_bit_activations(observed):
    layer, statistics = observed
    name, x = "model.layers.0.self_attn.q_proj", statistics["qkv"].sampled()
    exact = x @ layer.matrices[name].T

    def error(x, weight):
        return float((round_rows(x) @ round_rows(weight).T - exact).square().mean())

    plain = error(x, layer.matrices[name])
    smooth_layer(layer, statistics, torch.bfloat16)
    assert error(statistics["qkv"].sampled(), layer.matrices[name]) < 0.8 * plain


def test_matrices_that_no_token_reaches_are_rounded_to_the_nearest(observed):
    layer, statistics = observed
    statistics["down"] = Statistics.empty(96, 300, torch.device("cpu"))
    for method in ("awq", "gptq", "int8"):
        done = compress_layer(
            layer, statistics, Recipe(method, group_size=0 if method == "int8" else 32), torch.bfloat16
        )
        reports = {report.name: report for report in done.reports}
        down = reports["model.layers.0.mlp.down_proj"]
        assert down.notes == (UNREACHED,)
        assert down.num_tokens == 0
        assert down.error == down.plain_error > 0
        assert reports["model.layers.0.mlp.up_proj"].notes == ()


def test_trouble_is_said(observed):
    layer, statistics = observed
    statistics["down"].max_abs[5] = 0
    statistics["down"].num_tokens = 50
    done = compress_layer(layer, statistics, Recipe("gptq", group_size=32), torch.bfloat16)
    assert done.reports[-1].notes == (DEAD, FEW)


@pytest.mark.parametrize("method", ["rtn", "fp8"])
def test_without_data(observed, method):
    layer, _ = observed
    recipe = Recipe(method, group_size=32 if method == "rtn" else 0)
    done = compress_layer(layer, None, recipe, torch.bfloat16)
    assert all(0 < report.error == report.plain_error < 0.02 for report in done.reports)
    assert {weight.format.name for weight in done.weights.values()} == {recipe.weight_format}
