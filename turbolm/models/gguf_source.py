"""GGUF files as Hugging Face checkpoints: names, order of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from turbolm.errors import CheckpointError, UnsupportedModelError, nearest
from turbolm.models.gguf import GGUFFile
from turbolm.weights import TensorInfo

ROPE_FACTORS = "rope_freqs.weight"  # keeps its name: Hugging Face checkpoints have it in the config


class Architecture(NamedTuple):
    """How a GGUF architecture maps to a Hugging Face one."""

    hf_name: str
    model_type: str
    has_permuted_qk: bool
    """The rows of q and k are in the order of interleaved rotation: a head's pairs (i, i + d/2) side
    by side."""
    has_qk_norm: bool = False


#: `general.architecture` → its Hugging Face counterpart. Mistral's files say "llama"; an internlm2
#: whose wqkv is split into q, k and v, as GGUF has it, is a llama.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", has_permuted_qk=True),
    "internlm2": Architecture("LlamaForCausalLM", "llama", has_permuted_qk=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", has_permuted_qk=False),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", has_permuted_qk=False, has_qk_norm=True),
}

_TOP_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_NAME = re.compile(r"(\w+)\.(weight|bias)")
_UNUSED_NAME = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # inverse frequencies, in old files


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises CheckpointError where the file names none, UnsupportedModelError for an unknown one."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{file.path}: the metadata lack general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} has a model of architecture '{name}'; turbolm reads GGUF files of "
            f"{', '.join(ARCHITECTURES)}.{nearest(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


class GGUFSource:
    """The tensors of a GGUF file under Hugging Face names, q and k in Hugging Face row order
    (a `WeightSource`)."""

    def __init__(self, file: GGUFFile) -> None:
        """Raises UnsupportedModelError for a tensor that the architecture's Hugging Face counterpart
        doesn't have: the model computes something that turbolm would leave out."""
        self.file = file
        architecture = architecture_of(file)
        self._gguf_names: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for gguf_name, tensor in file.tensors.items():
            if _UNUSED_NAME.fullmatch(gguf_name):
                continue
            name = _translate(gguf_name, architecture)
            if name is None:
                raise UnsupportedModelError(
                    f"{file.path}: tensor {gguf_name} is not part of a {architecture.model_type} model as turbolm "
                    "knows it (a mixture of experts, or another variant)"
                )
            self._gguf_names[name] = gguf_name
            self._tensors[name] = TensorInfo(name, tensor.shape, tensor.type.name, tensor.num_bytes)
        self._permuted_heads = _permuted_heads(file) if architecture.has_permuted_qk else {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Tensor:
        """A view of the mapped file; q and k of permuted architectures are a copy."""
        data = self.file.read(self._gguf_name(name))
        module = name.rpartition(".")[0].rpartition(".")[2]
        num_heads = self._permuted_heads.get(module)
        return data if num_heads is None else unpermute_rows(data, num_heads, name)

    def release(self, name: str) -> None:
        self.file.release(self._gguf_name(name))

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise CheckpointError(f"{self.file.path} has no tensor {name}")
        return self._gguf_names[name]


def unpermute_rows(data: Tensor, num_heads: int, name: str) -> Tensor:
    """Rows [heads, d/2, 2] → [heads, 2, d/2]: from interleaved rotation's order (llama.cpp's) to
    Hugging Face's. Exact for packed rows too, as blocks run along rows."""
    if data.shape[0] % (2 * num_heads):
        raise CheckpointError(f"{name} has {data.shape[0]} rows; {num_heads} heads of an even size are expected")
    half = data.shape[0] // (2 * num_heads)
    return data.reshape(num_heads, half, 2, *data.shape[1:]).transpose(1, 2).reshape(data.shape)


def head_count(file: GGUFFile, key: str) -> int | None:
    """attention.head_count or head_count_kv, as a number or an array with one for each layer."""
    full_key = f"{file.metadata['general.architecture']}.attention.{key}"
    value = file.metadata.get(full_key)
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise UnsupportedModelError(f"{file.path}: {full_key} differs between layers: {value.tolist()}")
        value = value[0].item()
    if value is not None and (type(value) is not int or not 0 < value < 1 << 16):
        raise CheckpointError(f"{file.path}: {full_key} is {value!r}, not a number of heads")
    return value


def _permuted_heads(file: GGUFFile) -> dict[str, int]:
    num_heads = head_count(file, "head_count")
    if num_heads is None:
        raise CheckpointError(f"{file.path}: the metadata lack attention.head_count")
    return {"q_proj": num_heads, "k_proj": head_count(file, "head_count_kv") or num_heads}


def _translate(gguf_name: str, architecture: Architecture) -> str | None:
    if gguf_name == ROPE_FACTORS:
        return gguf_name
    if match := _LAYER_NAME.fullmatch(gguf_name):
        if match[2] in ("attn_q_norm", "attn_k_norm") and not architecture.has_qk_norm:
            return None
        module = _LAYER_MODULES.get(match[2])
        return module and f"model.layers.{int(match[1])}.{module}.{match[3]}"
    if match := _TOP_NAME.fullmatch(gguf_name):
        module = _TOP_MODULES.get(match[1])
        return module and f"{module}.{match[2]}"
    return None
