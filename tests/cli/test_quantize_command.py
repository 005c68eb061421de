from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from turbolm.cli.main import main
from turbolm.text import byte_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "vocab_size": 264, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    shapes = {"embed_tokens": (264, 32), "norm": (32,)}
    for i in range(2):
        rows = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
        shapes |= {f"layers.{i}.self_attn.{name}": (n, 32) for name, n in rows.items()}
        shapes |= {f"layers.{i}.mlp.{name}_proj": (64, 32) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.mlp.down_proj": (32, 64)}
        shapes |= {f"layers.{i}.{name}": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(
        {f"model.{name}.weight": torch.rand(shape) + (len(shape) == 1) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return str(folder)


def test_quantizes_and_says_what_it_cost(model, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--context", "64", "--samples", "4", "--group-size", "32", "--format", "compressed-tensors"]
    assert main(["quantize", "awq", model, "-o", str(output), *arguments]) == 0
    text, progress = capsys.readouterr()
    rows = [line.split() for line in text.splitlines() if line.startswith("model.layers.")]
    assert [row[0] for row in rows] == ["model.layers.0", "model.layers.1"]
    assert all(float(row[2].rstrip("%")) <= float(row[1].rstrip("%")) for row in rows)
    assert "warning: calibration with 256 tokens only" in text
    assert f"{output}: " in text
    assert "2 of 2 layers" in progress
    assert (
        json.loads((output / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    assert main(["quantize", "awq", model, "-o", str(output), *arguments]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["awk"], "Did you mean 'awq'"),
        (["awq", "--bits", "2"], "bits is 2; allowed: 4"),
        (["awq", "--group-size", "64"], "64 doesn't divide the 32 input columns"),
        (["awq", "--data", "none.txt"], "can't read the calibration data none.txt"),
        (["rtn", "--groupsize", "64"], "Did you mean --group-size?"),
    ],
)
def test_mistakes_end_with_a_message(model, tmp_path, capsys, arguments, message):
    method, *rest = arguments
    assert main(["quantize", method, model, "-o", str(tmp_path / "out"), "--context", "64", *rest]) == 2
    assert message in capsys.readouterr().err


def test_static_scales_of_a_kv_cache(model, tmp_path, capsys):
    options = ["--context", "64", "--samples", "4"]
    assert main(["quantize", "kv", model, *options]) == 0
    assert f"{model}/kv_scales.json: static scales" in capsys.readouterr().out
    assert main(["quantize", "kv", model, "-o", str(tmp_path / "other.json"), *options]) == 0
    assert (tmp_path / "other.json").read_text() == (tmp_path / "model" / "kv_scales.json").read_text()
    assert main(["quantize", "kv", model, "--group-size", "64"]) == 2
    assert "group_size says nothing of a KV cache; kv takes data, samples, context, device" in capsys.readouterr().err
    assert main(["quantize", "kv", model, "--context", "4000"]) == 2
    assert "context is 4000; allowed: 1 to 128" in capsys.readouterr().err


def test_help_does_not_load_torch():
    code = (
        "import sys; from turbolm.cli.main import main; main(['quantize', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--group-size" in done.stdout
