"""GPTQ's packing of int4 and int8 weights, as AutoGPTQ and GPTQModel write it.

    qweight  int32 [k/8, n]    scales  float16 [k/g, n]    qzeros  int32 [k/g, n/8]    g_idx  int32 [k]

with 4 instead of 8 where codes have 8 bits. A word holds the codes of consecutive columns (qweight) or rows
(qzeros), lowest bits first. Version 1 of the packing stores zero points less 1. g_idx is the group of each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.quant.grouped import group_size as group_size_of
from turbolm.quant.int4 import int4
from turbolm.quant.int8 import int8
from turbolm.quant.method import ADVICE, Fields, count_groups, read_order, read_part, read_scales, words_shape
from turbolm.quant.nibbles import bytes_of_words, pack_nibbles, unpack_nibbles, words_of_bytes
from turbolm.weights import Weight, WeightSource

# Fields that say how the file was made, or how others should run it.
# fmt: off
_SILENT = frozenset([
    "quant_method", "method", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "sym",
    "lm_head", "model_name_or_path", "model_file_base_name", "meta", "dataset", "tokenizer", "batch_size",
    "pad_token_id", "use_exllama", "disable_exllama", "max_input_length", "exllama_config", "cache_block_outputs",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "use_cuda_fp16",
    "model_seqlen", "backend", "act_group_aware", "hyb_act", "mse", "offload_to_disk", "offload_to_disk_path",
])
# fmt: on


@dataclass(frozen=True, slots=True)
class Gptq:
    """`group_size`: columns that share a scale, -1: all of a row. `version`: 1 ("gptq") or 2 ("gptq_v2").
    `has_order`: columns are grouped in another order than the input's (desc_act)."""

    group_size: int
    bits: int = 4
    version: int = 1
    has_order: bool = False
    method = "gptq"

    @property
    def formats(self) -> tuple[str, ...]:
        return (f"int{self.bits}",)

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> Gptq:
        """From a quantization_config. Raises UnsupportedModelError naming a field that turbolm can't follow."""
        fields = Fields(config, "quantization_config (gptq)")
        bits = fields.choice("bits", (4, 8))
        packing = fields.choice(("checkpoint_format", "format"), ("gptq", "gptq_v2"), "gptq")
        fields.choice("is_marlin_format", (False,), False)
        group_size, has_order = fields.group_size(), fields.flag("desc_act", False)
        dynamic = fields.get("dynamic", {})
        if not isinstance(dynamic, dict) or not all(str(name).startswith("-:") for name in dynamic):
            raise fields.refusal("dynamic", dynamic, ("modules left out, '-:…'",))
        fields.choice("pack_dtype", ("int32",), "int32")
        fields.finish(_SILENT)
        return cls(group_size, bits, 2 if packing == "gptq_v2" else 1, has_order)

    def quantization_config(self, *, symmetric: bool = False) -> dict[str, Any]:
        """As GPTQModel writes it."""
        return {
            "quant_method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.has_order,
            "sym": symmetric,
            "lm_head": False,
            "true_sequential": True,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
        }

    def detect(self, source: WeightSource, prefix: str) -> bool:
        return f"{prefix}.qweight" in source.tensors

    def load(self, source: WeightSource, prefix: str) -> Weight:
        name = f"{prefix}.qweight"
        words, n = words_shape(source, name)
        per_word = 32 // self.bits
        k = words * per_word
        num_groups = count_groups(name, k, self.group_size)
        reason = f"belongs to groups of {self.group_size} in {name} {[words, n]} of {self.bits} bits"
        if n % per_word:
            raise CheckpointError(f"{name} has {n} rows, which are not whole words of {per_word}; the file is broken")
        scales = read_scales(source, f"{prefix}.scales", (num_groups, n), reason).T.contiguous()
        zeros = self._zeros(read_part(source, f"{prefix}.qzeros", ("I32",), (num_groups, n // per_word), reason))
        codes = bytes_of_words(source.read(name).T)
        columns = read_order(source, f"{prefix}.g_idx", k, num_groups, reason, required=self.has_order)
        if self.bits == 8:
            return _int8(prefix, codes, scales, zeros, columns)
        if columns is not None:
            codes = pack_nibbles(unpack_nibbles(codes).index_select(1, columns))
        return int4(codes, scales, zeros, columns)

    def pack(self, prefix: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of an int4 matrix, by name; `load` gives the same codes, zeros and columns, and scales in
        float16. Raises ConfigError for a matrix that the packing can't hold."""
        n, k = weight.shape
        zeros, columns = weight.tensors["zeros"], weight.tensors.get("columns")
        if self.bits != 4 or n % 8 or k % 8 or (columns is not None and not self.has_order):
            raise ConfigError(f"{prefix}: gptq {self} can't pack a {n} x {k} {weight.format.name} matrix; use another")
        first = 2 - self.version  # the smallest zero point
        if int(zeros.min()) < first or int(zeros.max()) > 15:
            raise ConfigError(
                f"{prefix} has zero points {int(zeros.min())}..{int(zeros.max())}; version {self.version} of gptq's "
                f"packing holds {first}..15 (readers don't agree on 0 in version 1)"
            )
        group = group_size_of(weight)
        if group != (k if self.group_size == -1 else self.group_size):
            raise ConfigError(f"{prefix} has groups of {group}, not {self.group_size}")
        codes, groups = weight.tensors["codes"], torch.arange(k, dtype=torch.int32) // group
        if columns is not None:
            place = torch.argsort(columns)
            codes, groups = pack_nibbles(unpack_nibbles(codes)[:, place]), groups[place]
        return {
            f"{prefix}.qweight": words_of_bytes(codes).T.contiguous(),
            f"{prefix}.qzeros": words_of_bytes(pack_nibbles((zeros - first).T)),
            f"{prefix}.scales": weight.tensors["scales"].to(torch.float16).T.contiguous(),
            f"{prefix}.g_idx": groups,
        }

    def _zeros(self, words: Tensor) -> Tensor:
        """int32 [k/g, words] → uint8 [n, k/g]. Version 1 takes 1 from each zero point in the words as a whole: what a
        zero point of 0 borrows from its neighbour is so given back."""
        if self.version == 1:
            words = words + (0x11111111 if self.bits == 4 else 0x01010101)
        stored = bytes_of_words(words)
        return (stored if self.bits == 8 else unpack_nibbles(stored)).T.contiguous()


def _int8(prefix: str, codes: Tensor, scales: Tensor, zeros: Tensor, columns: Tensor | None) -> Weight:
    if columns is not None or (zeros != 128).any():
        what = "an order of columns (desc_act)" if columns is not None else "zero points"
        raise UnsupportedModelError(f"{prefix}: turbolm reads 8-bit weights of gptq without {what}; {ADVICE}")
    return int8((codes ^ 128).view(torch.int8), scales)
