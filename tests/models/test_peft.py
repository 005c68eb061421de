"""LoRA adapters against `peft` in float32, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import PROJECTIONS, save_random_adapter
from safetensors.torch import load_file, save_file
from test_parity import assert_close, batch_of, load, prompts
from tiny import TINY_MODELS, save_as_internlm2

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.kv import KvFormat
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.peft import read_adapter
from turbolm.models.registry import decoder_spec
from turbolm.ops.reference import ReferenceOps

CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"down_proj": 3},
    },
    "regex": {"r": 17, "lora_alpha": 16, "target_modules": r".*layers\.[01]\.self_attn\.(k|o)_proj"},
    "layers": {
        "r": 3, "lora_alpha": 4, "target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [0, 2],
        "exclude_modules": ["model.layers.0.mlp.gate_proj"],
    },
}  # fmt: skip


def with_adapter(name: str, key: str, folder: Path) -> peft.PeftModel:
    """A tiny model with an adapter of a config, which is saved."""
    torch.manual_seed(5)
    model = peft.get_peft_model(TINY_MODELS[name].model(), peft.LoraConfig(**CONFIGS[key]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3"])
@torch.inference_mode()
def test_logits_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    """Each adapter, and none, beside the others in one step."""
    base = TINY_MODELS[name].save(tmp_path / "model")
    model, caches = load(tmp_path / "model")
    adapted = AdaptedDecoder(model, len(CONFIGS), 17)
    references: list[Any] = []
    for place, key in enumerate(CONFIGS):
        references.append(with_adapter(name, key, tmp_path / key))
        adapted.put(place, read_adapter(tmp_path / key, model.spec))
    references.append(base)
    tokens = prompts()
    for chosen in ((0, 1, 2), (3, -1, 0), (2, 3, -1)):
        batch = batch_of([(i, t, 0) for i, t in enumerate(tokens)])
        places = torch.tensor([p for p, t in zip(chosen, tokens, strict=True) for _ in t], dtype=torch.int32)
        logits = model.forward(replace(batch, adapters=places), caches).split([len(t) for t in tokens])
        for place, t, own in zip(chosen, tokens, logits, strict=True):
            assert_close(own, references[place](t[None]).logits[0])


@torch.inference_mode()
def test_an_adapter_of_a_packed_matrix_is_what_its_merged_weights_are(tmp_path: Path) -> None:
    """InternLM 2 packs q, k and v, in an order that isn't that of the computation."""
    save_as_internlm2(tmp_path)
    spec = decoder_spec(open_checkpoint(tmp_path).config)
    folder = save_random_adapter(tmp_path, tmp_path / "adapter", 3, targets=["wqkv", "wo", "w1", "w2", "w3"])
    model, caches = load(tmp_path)
    adapter = read_adapter(folder, spec)
    AdaptedDecoder(model, 1, 8).put(0, adapter)
    tokens = prompts()[0]
    batch = replace(batch_of([(0, tokens, 0)]), adapters=torch.zeros(len(tokens), dtype=torch.int32))
    ours = model.forward(batch, caches)

    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, own in adapter.modules.items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + own.scale * own.b_nr @ own.a_rk
    save_file(tensors, path, {"format": "pt"})
    merged, caches = load(tmp_path)
    assert_close(ours, merged.forward(batch_of([(0, tokens, 0)]), caches))


@torch.inference_mode()
def test_a_real_model_with_an_adapter_is_one_with_merged_weights(smollm2_path: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    ops = ReferenceOps(torch.device("cpu"), torch.float32)
    model = load_decoder(decoder_spec(checkpoint.config), Loader(checkpoint.source, ops), 64)
    adapter = read_adapter(save_random_adapter(smollm2_path, tmp_path / "adapter", 7, rank=20), model.spec)
    AdaptedDecoder(model, 1, 20).put(0, adapter)
    caches = cache_spec(model.spec, KvFormat.both("float32")).allocate(12, 8, ops.device)
    batch = batch_of([(0, prompts(5000)[0], 0)])
    plain = model.forward(batch, caches)
    ours = model.forward(replace(batch, adapters=torch.zeros(batch.num_tokens, dtype=torch.int32)), caches)
    for spec, layer in zip(model.spec.layers, model.layers, strict=True):
        for linear, names in (
            (layer.attention.qkv, spec.attention_names.qkv),
            (layer.attention.output, [spec.attention_names.output]),
            (layer.mlp.gate_up, [spec.mlp.gate, spec.mlp.up]),
            (layer.mlp.down, [spec.mlp.down]),
        ):
            added = [adapter.modules[name] for name in names]
            linear.weight.dense += torch.cat([own.scale * own.b_nr @ own.a_rk for own in added])
    merged = model.forward(batch, caches)
    assert_close(ours, merged)
    assert (plain - merged).abs().max() > 0.1 * merged.abs().max(), "the adapter changes something"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    TINY_MODELS["llama"].save(folder / "model")
    save_random_adapter(folder / "model", folder / "adapter", 1)
    return folder


def refusal(original: Path, folder: Path, change: Callable[[Path], None]) -> str:
    shutil.copytree(original / "adapter", folder / "adapter")
    change(folder / "adapter")
    spec = decoder_spec(open_checkpoint(original / "model").config)
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        read_adapter(folder / "adapter", spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"a_field_of_tomorrow": 2}, "a_field_of_tomorrow is 2"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "w1"]}, "'w1'"),
        ({"target_modules": "(q"}, "no regular expression"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": ["query"]}, "another one"),
        ({"target_modules": ["q_proj"]}, "weight is of none of the modules"),
        ({"r": 0}, "r is 0"),
        ({"r": 1 << 20}, "r is 1048576"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q_proj": 5}}, "q_proj.lora_A.weight has the shape [8, 64]"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_name(
    fields: dict[str, Any], text: str, original: Path, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))

    assert text in refusal(original, tmp_path, change)


def test_broken_files_are_refused_by_the_tensor_at_fault(original: Path, tmp_path: Path) -> None:
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            tensors = load_file(folder / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, folder / "adapter_model.safetensors")

        return write

    def cut(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def pickled(folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    cases: dict[str, tuple[Callable[[Path], None], str]] = {
        "missing": (changed(lambda t: t.pop(first)), f"lacks the tensor {first}"),
        "shape": (changed(lambda t: t.update({first: torch.zeros(8, 63)})), f"{first} has the shape [8, 63]"),
        "kind": (changed(lambda t: t.update({first: torch.zeros(8, 64, dtype=torch.int32)})), f"{first} is of I32"),
        "extra": (changed(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)})), "lm_head.weight"),
        "cut": (cut, "truncated"),
        "pickled": (pickled, "pickle"),
        "json": (lambda folder: (folder / "adapter_config.json").write_text("{") and None, "no JSON"),
    }
    for name, (change, text) in cases.items():
        assert text in refusal(original, tmp_path / name, change)


def test_the_projections_are_those_of_the_layers(original: Path) -> None:
    adapter = read_adapter(original / "adapter", decoder_spec(open_checkpoint(original / "model").config))
    assert {name.rpartition(".")[2] for name in adapter.modules} == set(PROJECTIONS)
    assert (adapter.rank, len(adapter.modules)) == (8, 21)
