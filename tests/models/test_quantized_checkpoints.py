"""Quantized checkpoints: tiny Llamas packed in each way compute what transformers computes with the same weights
unpacked; broken ones are refused by the tensor's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import assert_close, batch_of, load, prompts
from tiny import TINY_MODELS, save_as_internlm2
from torch import Tensor
from transformers import PreTrainedModel

from turbolm.config import EngineConfig, Hardware, resolve
from turbolm.engine.build import model_needs
from turbolm.errors import CapacityError, CheckpointError, ConfigError, UnsupportedModelError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.quant.awq import Awq
from turbolm.quant.compressed_scheme import Scheme
from turbolm.quant.compressed_tensors import CompressedTensors
from turbolm.quant.gptq import Gptq
from turbolm.quant.int4 import int4
from turbolm.quant.rounding import Rounding, round_weight
from turbolm.weights import Weight

Rewrite = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]  # module, matrix → its tensors, what they mean


def with_order(weight: Weight) -> Weight:
    """The same codes for other columns."""
    columns = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    return int4(*(weight.tensors[name] for name in ("codes", "scales", "zeros")), columns)


def by(
    packing: Any, target: str, change: Callable[[Weight], Weight] = lambda weight: weight, **options: Any
) -> Rewrite:
    def rewrite(module: str, matrix: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        weight = change(round_weight(matrix, target, **options))  # type: ignore[arg-type]
        return packing.pack(module, weight), weight.dequantize(torch.float32)

    return rewrite


def fp8_blocks(module: str, matrix: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    codes, scale = (matrix / 2).to(torch.float8_e4m3fn), torch.full((1, 1), 2.0)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}, codes.float() * 2


def no_zero(weight: Weight) -> Weight:
    """Zero points of 1 and more, as version 1 of GPTQ's packing has them."""
    return int4(weight.tensors["codes"], weight.tensors["scales"], weight.tensors["zeros"].clamp(min=1))


def linear(target: Any, group: int = -1, **fields: Any) -> CompressedTensors:
    return CompressedTensors((Scheme(("Linear",), target, group, **fields),), ("lm_head",))


_symmetric, _asymmetric = linear("int4", 32), linear("int4", 32, is_symmetric=False)
_mixed = CompressedTensors((Scheme(("re:.*mlp.*",), "int8"), Scheme(("Linear",), "int4", 32)), ("lm_head",))
_mixed_int4 = by(_mixed, "int4", group_size=32, symmetric=True)
PACKINGS: dict[str, tuple[dict[str, Any], Rewrite]] = {
    "awq": (Awq(32).quantization_config(), by(Awq(32), "int4", group_size=32)),
    "awq-row": (Awq(-1).quantization_config(), by(Awq(-1), "int4", group_size=-1)),
    "gptq": (Gptq(32).quantization_config(), by(Gptq(32), "int4", no_zero, group_size=32)),
    "gptq-v2": (Gptq(32, version=2).quantization_config(), by(Gptq(32, version=2), "int4", group_size=32)),
    "gptq-order": (
        Gptq(32, version=2, has_order=True).quantization_config(),
        by(Gptq(32, version=2, has_order=True), "int4", with_order, group_size=32),
    ),
    "ct-int4": (_symmetric.quantization_config(), by(_symmetric, "int4", group_size=32, symmetric=True)),
    "ct-int4-asymmetric": (_asymmetric.quantization_config(), by(_asymmetric, "int4", group_size=32)),
    "ct-int8": (linear("int8", activations="dynamic").quantization_config(), by(linear("int8"), "int8")),
    "ct-fp8": (linear("fp8", activations="dynamic").quantization_config(), by(linear("fp8"), "fp8")),
    "ct-mixed": (
        _mixed.quantization_config(),
        lambda module, matrix: (by(_mixed, "int8") if "mlp" in module else _mixed_int4)(module, matrix),
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, fp8_blocks),
}  # fmt: skip


def quantize(folder: Path, name: str, model: PreTrainedModel, key: str = "quantization_config") -> None:
    """Rewrite the layers' matrices of a checkpoint, and put what they mean into `model`."""
    config, rewrite = PACKINGS[name]
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    for tensor_name in [n for n in tensors if n.startswith("model.layers.") and tensors[n].dim() == 2]:
        parts, meaning = rewrite(tensor_name.removesuffix(".weight"), tensors.pop(tensor_name).float())
        tensors |= parts
        if tensor_name in parameters:
            parameters[tensor_name].data.copy_(meaning)
    save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | {key: config}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("name", PACKINGS)
@torch.inference_mode()
def test_logits_equal_those_of_the_unpacked_weights(name: str, tmp_path: Path) -> None:
    reference = TINY_MODELS["llama-biases"].save(tmp_path)
    quantize(tmp_path, name, reference, "compression_config" if name == "ct-int8" else "quantization_config")
    model, caches = load(tmp_path)
    tokens = prompts()
    logits = model.forward(batch_of([(i, t, 0) for i, t in enumerate(tokens)]), caches)
    assert_close(logits, torch.cat([reference(t[None]).logits[0] for t in tokens]))


@torch.inference_mode()
def test_rows_of_a_packed_qkv_are_reordered(tmp_path: Path) -> None:
    """InternLM 2's grouped wqkv: the rows of a quantized matrix are put in order as those of a dense one are."""
    logits, packing = [], Awq(32)
    for folder, is_packed in ((tmp_path / "dense", False), (tmp_path / "packed", True)):
        save_as_internlm2(folder)
        tensors = load_file(folder / "model.safetensors")
        for module in ("model.layers.0.attention.wqkv", "model.layers.2.attention.wqkv"):
            weight = round_weight(tensors.pop(f"{module}.weight"), "int4", group_size=32)
            dense = {f"{module}.weight": weight.dequantize(torch.float32)}
            tensors |= packing.pack(module, weight) if is_packed else dense
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change = {"quantization_config": packing.quantization_config()} if is_packed else {}
        (folder / "config.json").write_text(json.dumps(config | change))
        model, caches = load(folder)
        logits.append(model.forward(batch_of([(2, prompts()[2], 0)]), caches))
    assert torch.equal(*logits)


def test_the_config_of_old_gptq_checkpoints_in_a_file_of_its_own(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"].save(tmp_path)
    quantize(tmp_path, "gptq", model)
    config = json.loads((tmp_path / "config.json").read_text())
    gptq = config.pop("quantization_config")
    del gptq["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq))
    assert open_checkpoint(tmp_path).packing == Gptq(32)


def test_zero_biases_of_quantized_checkpoints_are_harmless(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"].save(tmp_path)
    quantize(tmp_path, "gptq", model)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.bias"
    save_file(tensors | {name: torch.zeros(64)}, tmp_path / "model.safetensors")
    load(tmp_path)
    save_file(tensors | {name: torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.bias, which the config rules out"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("model.layers.2.mlp.up_proj.scales", None), r"model\.layers\.2\.mlp\.up_proj\.scales"),
        (("model.layers.0.self_attn.o_proj.qweight", None), r"model\.layers\.0\.self_attn\.o_proj\.\w+ as"),
        (("model.layers.1.mlp.down_proj.qzeros", torch.zeros(3, 4, dtype=torch.int32)), r"down_proj\.qzeros"),
    ],
)
def test_checkpoints_with_missing_or_wrong_parts(change: Any, named: str, tmp_path: Path) -> None:
    quantize(tmp_path, "awq", TINY_MODELS["llama"].save(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors") | dict([change])
    save_file({n: tensor for n, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModelError), match=named):
        load(tmp_path)


def test_an_unknown_variant_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    quantize(tmp_path, "awq", TINY_MODELS["llama"].save(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=rf"{tmp_path}.*'version': 'gemv'.*'gemm'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("target", ["int4", "int8", "fp8"])
@torch.inference_mode()
def test_rounding_at_load(target: Any, tmp_path: Path) -> None:
    """A checkpoint rounded while it is loaded is the checkpoint that was rounded before."""
    reference = TINY_MODELS["llama"].save(tmp_path)
    rounding = Rounding(target, "int8", frozenset(["lm_head", "model.embed_tokens"]), group_size=32)
    for name, parameter in reference.named_parameters():
        if parameter.dim() == 2:
            kind = "int8" if name.split(".")[-2] in ("lm_head", "embed_tokens") else target
            size = None if kind == "fp8" else 32
            parameter.copy_(round_weight(parameter, kind, group_size=size).dequantize(torch.float32))
    model, caches = load(tmp_path, rounding=rounding)
    tokens = prompts()[2]
    logits = model.forward(batch_of([(2, tokens, 0)]), caches)
    assert_close(logits, reference(tokens[None]).logits[0])


HARDWARE = Hardware("CPU", "x86_64", 2, ("avx2",), 16 << 30, 8 << 30, native="avx2")


def test_what_is_quantized_is_not_rounded_again(tmp_path: Path, smollm2_path: Path) -> None:
    quantize(tmp_path, "awq", TINY_MODELS["llama"].save(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    needs = model_needs("tiny", checkpoint, decoder_spec(checkpoint.config))
    with pytest.raises(ConfigError, match=r"weights is 'int8'.*'tiny' is quantized already \(int4\).*weights 'auto'"):
        resolve(EngineConfig(weights="int8"), needs, HARDWARE)
    resolve(EngineConfig(), needs, HARDWARE)
    blocks = open_checkpoint(smollm2_path)
    needs = model_needs("smol", blocks, decoder_spec(blocks.config))
    with pytest.raises(ConfigError, match=r"'smol' is quantized already \(q4_1, q8_0\)"):
        resolve(EngineConfig(weights="fp8"), needs, HARDWARE)


@pytest.mark.parametrize(
    ("packed", "weights", "needed"),
    [
        ((), "auto", "14.0 GB"),
        ((), "int8", "7.44 GB"),
        ((), "fp8", "7.44 GB"),
        ((), "int4", None),
        (("int4",), "auto", None),
        (("int8",), "auto", "7.91 GB"),
    ],
)
def test_the_memory_plan_counts_blocks_on_the_cpu(
    packed: tuple[str, ...], weights: Any, needed: str | None, tmp_path: Path
) -> None:
    """7 G weights, 6.5 G of them in layers: 5 or 8.5 bits each; the others 16; 6 GB are free."""
    TINY_MODELS["llama"].save(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    tiny = model_needs("tiny", checkpoint, decoder_spec(checkpoint.config))
    sizes = {"packed_bytes": 14 * 10**9, "num_parameters": 7 * 10**9, "layer_parameters": 65 * 10**8}
    model = replace(tiny, packed=packed, **sizes)
    config = EngineConfig(weights=weights, device="cpu", max_batch_size=1)
    machine = replace(HARDWARE, free_memory=6 * 10**9)
    if needed is None:
        found = resolve(config, model, machine)
        assert found.weights == weights
        assert any("rounded at load" in reason for reason in found.reasons) == (weights != "auto")
    else:
        with pytest.raises(CapacityError, match=rf"needs {needed} for its weights"):
            resolve(config, model, machine)


def test_the_memory_plan_counts_an_order_of_columns_as_unpacked(tmp_path: Path) -> None:
    quantize(tmp_path, "gptq-order", TINY_MODELS["llama"].save(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    tiny = model_needs("tiny", checkpoint, decoder_spec(checkpoint.config))
    needs = replace(tiny, layer_parameters=10**10, num_parameters=10**10)
    with pytest.raises(CapacityError, match=r"needs 20\.0 GB for its weights"):
        resolve(EngineConfig(device="cpu"), needs, HARDWARE)
