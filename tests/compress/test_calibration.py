from __future__ import annotations

import torch

from turbolm.compress.calibration import Calibration, RecordingOps
from turbolm.compress.layer import LayerTensors
from turbolm.compress.samples import Samples
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec

SAMPLES = Samples((tuple(range(3, 40)), (7,), tuple(range(90, 75, -1))), "test")


def start(folder, work):
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    work.mkdir(exist_ok=True)
    ops = RecordingOps(torch.device("cpu"), torch.float32)
    return checkpoint, spec, Calibration(spec, checkpoint.source, SAMPLES, ops, work)


def test_layer_by_layer_is_what_the_whole_model_computes(tiny_model, tmp_path, logits):
    folder = tiny_model()
    checkpoint, spec, calibration = start(folder, tmp_path / "work")
    calibration.embed()
    for index, layer_spec in enumerate(spec.layers):
        layer = LayerTensors.read(layer_spec, checkpoint.source, torch.device("cpu"))
        calibration.advance(index, layer)
    hidden = calibration._hidden[len(spec.layers) % 2]
    normed = hidden / (hidden.square().mean(1, keepdim=True) + spec.norm_eps).sqrt()
    table = checkpoint.source.read("model.embed_tokens.weight").float()
    torch.testing.assert_close(normed @ table.T, logits(folder, list(SAMPLES.token_ids)), rtol=1e-4, atol=1e-3)


def test_inputs_are_observed(tiny_model, tmp_path):
    checkpoint, spec, calibration = start(tiny_model(), tmp_path / "work")
    calibration.embed()
    layer = LayerTensors.read(spec.layers[0], checkpoint.source, torch.device("cpu"))
    found = calibration.observe(0, layer)
    assert {name: statistics.num_tokens for name, statistics in found.items()} == dict.fromkeys(
        ("qkv", "output", "gate_up", "down"), SAMPLES.num_tokens
    )
    ids = torch.tensor([token for sample in SAMPLES.token_ids for token in sample])
    x = checkpoint.source.read("model.embed_tokens.weight").float()[ids]
    x = (
        x
        / (x.square().mean(1, keepdim=True) + spec.norm_eps).sqrt()
        * layer.vectors[f"{spec.layers[0].attention_norm}.weight"]
    )
    torch.testing.assert_close(found["qkv"].gram, x.T @ x / len(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["qkv"].mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-4)
    assert found["down"].gram.shape == (96, 96)


def test_work_goes_on_from_the_files(tiny_model, tmp_path):
    folder = tiny_model()
    checkpoint, spec, calibration = start(folder, tmp_path / "work")
    calibration.embed()
    layer = LayerTensors.read(spec.layers[0], checkpoint.source, torch.device("cpu"))
    calibration.advance(0, layer)
    expected = calibration._hidden[1].clone()
    _, _, again = start(folder, tmp_path / "work")
    assert torch.equal(again._hidden[1], expected)
