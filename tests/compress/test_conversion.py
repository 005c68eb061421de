from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbolm import LLM
from turbolm.compress import calibrate_kv, convert, quantize
from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.converted import ConvertedLoader
from turbolm.models.decoder import load_decoder
from turbolm.models.registry import decoder_spec
from turbolm.models.sharding import ShardLoader, cuts, shard_spec
from turbolm.ops.select import select_layout
from turbolm.ops.sharded import PartialLinear
from turbolm.parallel.shard import Shard

TEXT = "The lighthouse at the end of the bay was built after three ships had been lost."
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def score(folder, **options):
    with LLM(str(folder), progress=False, max_context=128, threads=1, **options) as llm:
        return llm.score(TEXT)[0].logprobs, llm.config


@pytest.mark.parametrize("weights", ["auto", "int4"])
@pytest.mark.parametrize("changes", [{}, {**QWEN, "tie_word_embeddings": True}], ids=["llama", "biases"])
def test_converted_models_compute_the_same_bits(tiny_model, tmp_path, weights, changes):
    folder, done = tiny_model(**changes), []
    convert(str(folder), tmp_path / "out", device="cpu", weights=weights, progress=lambda *bytes_: done.append(bytes_))
    assert done[-1][0] == done[-1][1] > 0
    expected, _ = score(folder, weights=weights)
    found, config = score(tmp_path / "out")
    assert found == expected
    stored = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert config.weight_bytes == pytest.approx(stored, rel=0.1)
    shutil.rmtree(folder)
    assert score(tmp_path / "out")[0] == expected


def test_quantized_models_and_their_kv_scales_are_converted(tiny_model, data_file, tmp_path):
    quantize(str(tiny_model()), tmp_path / "awq", "awq", group_size=32, data=str(data_file), context=64)
    calibrate_kv(str(tmp_path / "awq"), data=str(data_file), context=64)
    convert(str(tmp_path / "awq"), tmp_path / "out", device="cpu")
    assert score(tmp_path / "out", kv="int8")[0] == score(tmp_path / "awq", kv="int8")[0]
    with pytest.raises(ConfigError, match="is quantized already; leave weights out"):
        convert(str(tmp_path / "awq"), tmp_path / "other", device="cpu", weights="int8")


@pytest.fixture
def converted(tiny_model, tmp_path):
    convert(str(tiny_model()), tmp_path / "out", device="cpu")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "reference"}, "converted for kernels 'native', and here it is 'reference'"),
        ({"weights": "int8"}, "converted for weights 'auto', and here it is 'int8'"),
        ({"dtype": "float32"}, "converted for dtype 'float32', and here it is 'float32, unpacked'"),
    ],
)
def test_loading_otherwise_is_refused(converted, options, message):
    with pytest.raises(ConfigError, match=message):
        LLM(str(converted), progress=False, **options)


def test_what_does_not_fit_is_refused(converted, tmp_path, tiny_model):
    for refused in (
        lambda: quantize(str(converted), tmp_path / "x", "rtn"),
        lambda: calibrate_kv(str(converted)),
        lambda: convert(str(converted), tmp_path / "x", device="cpu"),
    ):
        with pytest.raises(UnsupportedModelError, match="give the model that it was made of"):
            refused()
    with pytest.raises(ConfigError, match="is not an empty folder"):
        convert(str(tmp_path / "model"), converted)
    with pytest.raises(ConfigError, match="split over 2 devices"):  # groups of 32 of 96 columns
        convert(str(tmp_path / "model"), tmp_path / "x", device="cuda", weights="int4", tensor_parallel=2)
    assert not list((tmp_path / "x").iterdir())
    with pytest.raises(ConfigError, match="run in one process"):
        convert(str(tmp_path / "model"), tmp_path / "x", device="cpu", tensor_parallel=2)
    manifest = converted / "turbolm.json"
    record = json.loads(manifest.read_text())
    for change, message in (
        ({"fingerprint": "0123"}, "converted to another layout"),
        ({"version": 9}, "version 1: convert the model again"),
        ({"conversion": {}}, "is broken"),
        ({"matrices": {}}, "don't fit"),
        (
            {"conversion": record["conversion"] | {"device": "cuda"}},
            "converted for device 'cuda', and here it is 'cpu'",
        ),
        ({"conversion": record["conversion"] | {"tensor_parallel": 2}}, "converted for tensor_parallel 2"),
    ):
        manifest.write_text(json.dumps(record | change))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            LLM(str(converted), progress=False, device="cpu")


def test_broken_files_are_refused_by_the_matrix(converted):
    (path,) = converted.rglob("*.safetensors")
    tensors = load_file(path)
    name = "model.layers.1.mlp.gate_proj+model.layers.1.mlp.up_proj:part0"
    save_file(tensors | {name: tensors[name][:-32].clone()}, path)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.gate_proj\+model.layers.1.mlp.up_proj in .*is no packed"):
        LLM(str(converted), progress=False)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match="don't fit"):
        LLM(str(converted), progress=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        LLM(str(converted), progress=False)


@pytest.mark.parametrize(("weights", "size"), [("auto", 1), ("int4", 1), ("int8", 2), ("auto", 2)])
def test_gpu_layouts_are_made_without_a_gpu(tiny_model, tmp_path, weights, size):
    """What each rank reads is what it would prepare of the original."""
    folder = tiny_model(**QWEN)
    convert(str(folder), tmp_path / "out", device="cuda", weights=weights, tensor_parallel=size)
    again, original = open_checkpoint(tmp_path / "out"), open_checkpoint(folder)
    assert again.manifest is not None and again.manifest.conversion.tensor_parallel == size
    layout, spec = select_layout("cuda"), decoder_spec(again.config)
    for rank in range(size):
        shard = Shard(rank, size)
        ops = layout.make_ops(torch.bfloat16, 1, rank, size)
        found = load_decoder(shard_spec(spec, shard), ConvertedLoader(again.path, again.manifest, ops, rank), 64)
        if weights != "auto" or size == 1:
            continue
        loader = ShardLoader(original.source, layout.make_ops(torch.bfloat16, 1, rank, size), cuts(spec, shard))
        expected = load_decoder(shard_spec(spec, shard), loader, 64)
        assert torch.equal(found.embedding.weight, expected.embedding.weight)
        for mine, other in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(mine.attention.qkv.weight.weight, other.attention.qkv.weight.weight)
            assert torch.equal(mine.attention.qkv.weight.bias, other.attention.qkv.weight.bias)
            assert isinstance(mine.mlp.down.weight, PartialLinear)
            assert torch.equal(mine.mlp.down.weight.inner.weight, other.mlp.down.weight.inner.weight)
            assert torch.equal(mine.mlp_norm, other.mlp_norm)
