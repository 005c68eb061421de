from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbolm import LLM, SamplingParams
from turbolm.compress import quantize
from turbolm.compress.statistics import relative_error
from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.quant import load_weight
from turbolm.text import load_tokenizer

SEQUENCES = [tuple(range(60, 100)), tuple(range(180, 150, -1))]
RECIPES = [
    {"method": "awq"}, {"method": "awq", "symmetric": True, "group_size": -1},
    {"method": "awq", "format": "compressed-tensors"}, {"method": "awq", "format": "gptq"}, {"method": "gptq"},
    {"method": "gptq", "order": "group"}, {"method": "gptq", "format": "compressed-tensors", "symmetric": True},
    {"method": "gptq", "format": "awq", "order": "none"}, {"method": "rtn"}, {"method": "rtn", "format": "gptq"},
    {"method": "int8"}, {"method": "fp8"},
]  # fmt: skip


def run(folder, output, data_file, **options):
    data = {} if options["method"] in ("rtn", "fp8") else {"data": str(data_file), "context": 64}
    return quantize(str(folder), output, **data, **options)


@pytest.mark.parametrize("options", RECIPES, ids=lambda options: "-".join(map(str, options.values())))
def test_results_load_and_compute_what_the_model_did(tiny_model, tmp_path, data_file, logits, options):
    folder = tiny_model()
    report = run(folder, tmp_path / "out", data_file, **options)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(report.matrices) == 14
    for matrix in report.matrices:
        weight = load_weight(checkpoint.source, matrix.name, checkpoint.packing)
        assert weight.format.name == {"int8": "int8", "fp8": "fp8"}.get(options["method"], "int4")
    exact, rounded = logits(folder, SEQUENCES), logits(tmp_path / "out", SEQUENCES)
    error = float((exact - rounded).square().sum() / exact.square().sum())
    assert error < {"int8": 0.003, "fp8": 0.03}.get(options["method"], 0.3)
    assert not (tmp_path / "out" / ".partial").exists()
    saved = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert saved["matrices"][3]["error"] == report.matrices[3].error


def test_reported_errors_are_those_of_what_was_written(tiny_model, tmp_path, data_file):
    folder = tiny_model()
    report = run(folder, tmp_path / "out", data_file, method="rtn", format="gptq")
    checkpoint, before = open_checkpoint(tmp_path / "out"), load_file(folder / "model.safetensors")
    for matrix in report.matrices:
        weight = load_weight(checkpoint.source, matrix.name, checkpoint.packing).dequantize(torch.float32)
        exact = before[f"{matrix.name}.weight"].float()
        assert matrix.error == pytest.approx(relative_error(exact, weight, None), rel=1e-3)


def test_the_engine_answers_with_it(tiny_model, tmp_path, data_file):
    folder = tiny_model(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    run(folder, tmp_path / "out", data_file, method="awq")
    with LLM(str(tmp_path / "out"), threads=1, max_batch_size=2) as llm:
        (answer,) = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=4, ignore_eos=True))
        assert answer.outputs[0].usage.completion_tokens == 4
    assert load_tokenizer(tmp_path / "out").chat_templates == load_tokenizer(folder).chat_templates


class KilledError(Exception):
    pass


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_work_that_was_cut_off_goes_on_to_the_same_result(tiny_model, tmp_path, data_file, method):
    folder = tiny_model(num_hidden_layers=3)
    run(folder, tmp_path / "whole", data_file, method=method)
    steps = []

    def progress(done, total):
        steps.append((done, total))
        if len(steps) in (2, 4):
            raise KilledError

    for _ in range(2):
        with pytest.raises(KilledError):
            run(folder, tmp_path / "cut", data_file, method=method, progress=progress)
        assert not (tmp_path / "cut" / "config.json").exists()
    run(folder, tmp_path / "cut", data_file, method=method, progress=progress)
    assert steps == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_other_settings_do_not_go_on_with_it(tiny_model, tmp_path, data_file):
    def stop(done, total):
        if done == 1:
            raise KilledError

    folder = tiny_model()
    with pytest.raises(KilledError):
        run(folder, tmp_path / "out", data_file, method="awq", progress=stop)
    with pytest.raises(ConfigError, match=r"unfinished work with group_size 32, now it is -1"):
        run(folder, tmp_path / "out", data_file, method="awq", group_size=-1)


def test_big_models_keep_a_file_for_each_layer(tiny_model, tmp_path, data_file, logits, monkeypatch):
    monkeypatch.setattr("turbolm.compress.export._ONE_FILE", 1000)
    folder = tiny_model()
    run(folder, tmp_path / "out", data_file, method="rtn")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert logits(tmp_path / "out", SEQUENCES).isfinite().all()


def test_what_can_not_be_used_is_refused(tiny_model, tmp_path, data_file):
    folder = tiny_model()
    with pytest.raises(ConfigError, match="is not empty: give a new folder"):
        quantize(str(folder), folder, "rtn")
    with pytest.raises(ConfigError, match="is a file"):
        quantize(str(folder), data_file, "rtn")
    with pytest.raises(ConfigError, match="context is 512; the model was made for 128"):
        quantize(str(folder), tmp_path / "a", "awq")
    with pytest.raises(
        ConfigError, match=r"64 doesn't divide the 96 input columns of model\.layers\.0\.mlp\.down_proj"
    ):
        quantize(str(folder), tmp_path / "a", "rtn", group_size=64)
    run(folder, tmp_path / "b", data_file, method="rtn")
    with pytest.raises(UnsupportedModelError, match=r"is quantized already \(by compressed-tensors\)"):
        quantize(str(tmp_path / "b"), tmp_path / "c", "rtn")
    with pytest.raises(ConfigError, match="unknown quantization option 'group'"):
        quantize(str(folder), tmp_path / "a", "rtn", group=64)
    assert not (tmp_path / "a" / "config.json").exists()


def test_broken_weights_are_named(tiny_model, tmp_path, data_file):
    bad = torch.full((64, 64), float("inf"))
    folder = tiny_model({"model.layers.1.self_attn.q_proj.weight": bad})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight holds NaN or infinity"):
        run(folder, tmp_path / "out", data_file, method="awq")
    folder = tiny_model(name="second")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no matrix model\.layers\.0\.mlp\.up_proj\.weight"):
        run(folder, tmp_path / "second-out", data_file, method="rtn")
