from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbolm.compress.calibration import Calibration, RecordingOps
from turbolm.compress.layer import LayerTensors
from turbolm.compress.samples import Samples
from turbolm.errors import CheckpointError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec

SAMPLES = Samples(((5, 6, 7, 8, 9, 10, 11), (40, 41, 42)), "test")


def pack_qkv(folder):
    """An InternLM 2 of the Llama in `folder`: q, k and v of each key-value head in one matrix."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (
            ("model.embed_tokens", "model.tok_embeddings"), ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):  # fmt: skip
            name = name.replace(old, new)
        if "_proj" not in name:
            renamed[name] = tensor
    for i in range(2):
        parts = [tensors[f"model.layers.{i}.self_attn.{x}_proj.weight"].view(2, -1, 64) for x in "qkv"]
        renamed[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(parts, 1).flatten(0, 1).contiguous()
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "biases", "one-kv-head", "packed-qkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_scales_change_nothing_that_the_layer_computes(tiny_model, tmp_path, kind, dtype):
    changes = {
        "llama": {}, "biases": {"attention_bias": True}, "one-kv-head": {"num_key_value_heads": 1},
        "packed-qkv": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"},
    }  # fmt: skip
    folder = tiny_model(**changes[kind])
    if kind == "packed-qkv":
        pack_qkv(folder)
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    outputs = []
    for scaled in (False, True):
        ops = RecordingOps(torch.device("cpu"), torch.float32)
        work = tmp_path / str(scaled)
        work.mkdir()
        calibration = Calibration(spec, checkpoint.source, SAMPLES, ops, work)
        calibration.embed()
        layer = LayerTensors.read(spec.layers[0], checkpoint.source, ops.device)
        before = calibration.observe(0, layer)
        if scaled:
            for point in layer.points:
                count = point.producer.reduce(before[point.name].mean_abs).numel()
                scales = layer.fold(point, 0.3 + torch.rand(count, generator=torch.Generator().manual_seed(1)), dtype)
                before[point.name].scale(scales)
            after = calibration.observe(0, layer)
            for name, statistics in before.items():
                torch.testing.assert_close(after[name].gram, statistics.gram, rtol=1e-3, atol=1e-2)
                torch.testing.assert_close(after[name].max_abs, statistics.max_abs, rtol=1e-3, atol=1e-4)
            for norm in (spec.layers[0].attention_norm, spec.layers[0].mlp_norm):
                weight = layer.vectors[f"{norm}.weight"]
                assert torch.equal(weight, weight.to(dtype).float())  # what is stored is what was calibrated
        calibration.advance(0, layer)
        outputs.append(calibration._hidden[1].clone())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_broken_numbers_are_named(tiny_model):
    bad = torch.zeros(64, 64)
    bad[3, 4] = float("nan")
    checkpoint = open_checkpoint(tiny_model({"model.layers.1.self_attn.o_proj.weight": bad}))
    layer = decoder_spec(checkpoint.config).layers[1]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight holds NaN"):
        LayerTensors.read(layer, checkpoint.source, torch.device("cpu"))
