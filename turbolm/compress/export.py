"""A quantized model as a folder in Hugging Face's layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from turbolm.compress.layer import LayerTensors
from turbolm.compress.partial import Partial, write_tensors
from turbolm.compress.recipe import Recipe
from turbolm.models.checkpoint import Checkpoint
from turbolm.models.gguf_source import ROPE_FACTORS
from turbolm.models.spec import DecoderSpec
from turbolm.quant import load_weight
from turbolm.quant.awq import Awq
from turbolm.quant.compressed_scheme import Scheme
from turbolm.quant.compressed_tensors import CompressedTensors
from turbolm.quant.gptq import Gptq
from turbolm.text import Tokenizer
from turbolm.weights import Weight

_ONE_FILE = 2 << 30  # bytes of weights that still go into one file
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


class Exporter:
    """Writes one model's files. What is in no format of the recipe's stays in `dtype`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        tokenizer: Tokenizer,
        recipe: Recipe | None,
        dtype: torch.dtype,
    ) -> None:
        """`recipe` None: matrices stay in `dtype` too."""
        self._checkpoint = checkpoint
        self._spec = spec
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._dtype = dtype
        self._packing = None if recipe is None else _packing(recipe, spec.head or "lm_head")

    def layer_tensors(self, layer: LayerTensors, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
        """A layer's tensors as they are stored."""
        tensors = {name: vector.to(self._dtype) for name, vector in layer.vectors.items()}
        if self._packing is None:
            return tensors | {f"{module}.weight": w.dequantize(self._dtype) for module, w in weights.items()}
        for module, weight in weights.items():
            on_host = {name: tensor.cpu() for name, tensor in weight.tensors.items()}
            tensors |= self._packing.pack(module, replace(weight, tensors=on_host))
        return tensors

    def other_tensors(self) -> dict[str, Tensor]:
        """What is in no layer: embedding, last norm, head."""
        spec, source = self._spec, self._checkpoint.source
        modules = [spec.embedding, *((spec.head,) if spec.head is not None else ())]
        tensors = {
            f"{module}.weight": load_weight(source, module, self._checkpoint.packing).dequantize(self._dtype)
            for module in modules
        }
        name = f"{spec.final_norm}.weight"
        tensors[name] = source.read(name).to(self._dtype)
        if ROPE_FACTORS in source.tensors:
            tensors[ROPE_FACTORS] = source.read(ROPE_FACTORS).float()
        return tensors

    def write_weights(self, output: Path, partial: Partial) -> int:
        """The finished layers' files as the model's: as one, or as they are, with an index. → bytes."""
        files = [partial.file(index) for index in range(len(self._spec.layers) + 1)]
        num_bytes = sum(file.stat().st_size for file in files)
        if num_bytes <= _ONE_FILE:
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            write_tensors(tensors, output / "model.safetensors")
            return num_bytes
        names: dict[str, str] = {}
        for file in files:
            target = output / file.name.replace("weights-", "model-")
            names |= dict.fromkeys(load_file(file), target.name)
            target.unlink(missing_ok=True)
            target.hardlink_to(file)  # until the work is removed as finished
        index = {"metadata": {"total_size": num_bytes}, "weight_map": names}
        _write_json(output / "model.safetensors.index.json", index)
        return num_bytes

    def write_tokenizer(self, output: Path) -> list[str]:
        """The tokenizer's files, and what others will miss in them."""
        if self._checkpoint.gguf is None:
            for name in _COPIED:
                path = self._checkpoint.path / name
                if path.is_dir():
                    shutil.copytree(path, output / name, dirs_exist_ok=True)
                elif path.is_file():
                    shutil.copyfile(path, output / name)
            return []
        return _write_gguf_tokenizer(output, self._tokenizer)

    def write_config(self, output: Path) -> None:
        """config.json, last of all: the folder is a model from now on."""
        generation = dict(self._checkpoint.generation_config)
        if self._checkpoint.gguf is not None and self._tokenizer.eos_ids:
            generation["eos_token_id"] = list(self._tokenizer.eos_ids)
        if generation:
            _write_json(output / "generation_config.json", generation)
        left_out = ("dtype", "quantization_config", "compression_config")
        config = {name: value for name, value in self._checkpoint.config.items() if name not in left_out}
        config["torch_dtype"] = str(self._dtype).removeprefix("torch.")
        if self._recipe is not None:
            config["quantization_config"] = self._quantization_config(self._recipe)
        _write_json(output / "config.json", config)

    def _quantization_config(self, recipe: Recipe) -> dict[str, Any]:
        assert self._packing is not None
        if isinstance(self._packing, CompressedTensors):
            return self._packing.quantization_config()
        return self._packing.quantization_config(symmetric=recipe.symmetric)


def _packing(recipe: Recipe, head: str) -> Awq | Gptq | CompressedTensors:
    """How the recipe's weights are packed on disk. `head` stays as it is."""
    if recipe.file_format == "awq":
        return Awq(recipe.group_size)
    if recipe.file_format == "gptq":
        return Gptq(recipe.group_size, has_order=recipe.method == "gptq" and recipe.order == "group")
    if recipe.weight_format == "int4":
        scheme = Scheme(("Linear",), "int4", recipe.group_size, recipe.symmetric)
    else:
        scheme = Scheme(("Linear",), recipe.weight_format, activations="dynamic")
    return CompressedTensors((scheme,), ignore=(head,))


def _write_gguf_tokenizer(output: Path, tokenizer: Tokenizer) -> list[str]:
    """tokenizer.json and its config from a GGUF file's tokenizer."""
    backend = Backend.from_str(tokenizer.to_json())
    before, after = tokenizer.frame
    if before or after:
        names = {token_id: tokenizer.token_text(token_id) for token_id in (*before, *after)}
        parts = [*(names[i] for i in before), "$A", *(names[i] for i in after)]
        backend.post_processor = TemplateProcessing(
            single=parts, special_tokens=[(name, token_id) for token_id, name in names.items()]
        )
    backend.save(str(output / "tokenizer.json"))
    config: dict[str, Any] = {
        **tokenizer.special_tokens,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if "default" in tokenizer.chat_templates:
        config["chat_template"] = tokenizer.chat_templates["default"]
    _write_json(output / "tokenizer_config.json", config)
    extra = [name for name in tokenizer.chat_templates if name != "default"]
    return [f"the chat templates {', '.join(extra)} of the GGUF file were left out"] if extra else []


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
