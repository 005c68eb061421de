"""AutoAWQ's `gemm` packing of int4 weights.

    qweight  int32 [k, n/8]    scales  float16 [k/g, n]    qzeros  int32 [k/g, n/8]

A word holds eight output rows; its nibbles, lowest first, are rows 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbolm.errors import ConfigError
from turbolm.quant.grouped import group_size as group_size_of
from turbolm.quant.int4 import int4
from turbolm.quant.method import Fields, count_groups, read_part, read_scales, words_shape
from turbolm.quant.nibbles import bytes_of_words, pack_nibbles, unpack_nibbles, words_of_bytes
from turbolm.weights import Weight, WeightSource

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the row of each nibble of a word
_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of each row

# Fields that say how the file was made, or how others should run it.
# fmt: off
_SILENT = frozenset([
    "quant_method", "method", "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
    "exllama_config", "backend", "meta", "lm_head", "damp_percent", "true_sequential", "sym",
    "model_seqlen", "batch_size", "act_group_aware", "cache_block_outputs",
])
# fmt: on


@dataclass(frozen=True, slots=True)
class Awq:
    """`group_size`: columns that share a scale; -1: all of a row."""

    group_size: int
    method = "awq"
    formats = ("int4",)
    has_order = False

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> Awq:
        """From a quantization_config. Raises UnsupportedModelError naming a field that turbolm can't follow."""
        fields = Fields(config, "quantization_config (awq)")
        fields.choice("bits", (4,))
        fields.choice(("version", "format", "checkpoint_format"), ("gemm",), "gemm")
        fields.choice("desc_act", (False,), False)
        fields.flag("zero_point", True)  # qzeros say it again
        group_size = fields.group_size()
        fields.choice("pack_dtype", ("int32",), "int32")
        fields.finish(_SILENT)
        return cls(group_size)

    def quantization_config(self, *, ignore: Sequence[str] = (), symmetric: bool = False) -> dict[str, Any]:
        """As AutoAWQ writes it. `ignore`: modules that are not packed."""
        return {
            "quant_method": self.method,
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": not symmetric,
            "version": "gemm",
            "modules_to_not_convert": list(ignore) or None,
        }

    def detect(self, source: WeightSource, prefix: str) -> bool:
        return f"{prefix}.qweight" in source.tensors

    def load(self, source: WeightSource, prefix: str) -> Weight:
        name = f"{prefix}.qweight"
        k, words = words_shape(source, name)
        n, num_groups = 8 * words, count_groups(name, k, self.group_size)
        reason = f"groups of {self.group_size} in {name} {[k, words]}"
        scales = read_scales(source, f"{prefix}.scales", (num_groups, n), reason).T.contiguous()
        zeros = _unpack(read_part(source, f"{prefix}.qzeros", ("I32",), (num_groups, words), reason))
        return int4(_codes(source.read(name)), scales, zeros.T.contiguous())

    def pack(self, prefix: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of an int4 matrix, by name; `load` gives the same codes, zeros, and scales in float16. Raises
        ConfigError for a matrix that the packing can't hold."""
        n, k = weight.shape
        zeros = weight.tensors["zeros"]
        if n % 8 or k % 2 or "columns" in weight.tensors or int(zeros.max()) > 15:
            raise ConfigError(
                f"{prefix}: awq packs whole words of 8 rows, zero points up to 15 and no order of columns, got a "
                f"{n} x {k} matrix with zero points up to {int(zeros.max())}"
                f"{' and an order of columns' if 'columns' in weight.tensors else ''}; use compressed-tensors or gptq"
            )
        if group_size_of(weight) != (k if self.group_size == -1 else self.group_size):
            raise ConfigError(f"{prefix} has groups of {group_size_of(weight)}, not {self.group_size}")
        return {
            f"{prefix}.qweight": _pack(unpack_nibbles(weight.tensors["codes"]).T),
            f"{prefix}.qzeros": _pack(zeros.T),
            f"{prefix}.scales": weight.tensors["scales"].to(torch.float16).T.contiguous(),
        }


def _codes(words: Tensor) -> Tensor:
    """int32 [k, n/8] → uint8 [n, k/2]."""
    k, num_words = words.shape
    packed = bytes_of_words(words).view(k // 2, 2, num_words, 4)
    even, odd = packed[:, 0], packed[:, 1]  # columns of a pair
    halves = (even & 15 | odd << 4, even >> 4 | odd & 240)
    codes = torch.empty(num_words, 8, k // 2, dtype=torch.uint8, device=words.device)
    for place, row in enumerate(_ORDER):
        codes[:, row] = halves[place % 2][:, :, place // 2].T
    return codes.view(-1, k // 2)


def _unpack(words: Tensor) -> Tensor:
    """int32 [r, n/8] → uint8 [r, n]."""
    nibbles = unpack_nibbles(bytes_of_words(words)).view(words.shape[0], -1, 8)
    return nibbles[:, :, _PLACE].flatten(1)


def _pack(codes: Tensor) -> Tensor:
    """uint8 [r, n] → int32 [r, n/8]."""
    return words_of_bytes(pack_nibbles(codes.reshape(codes.shape[0], -1, 8)[:, :, _ORDER].flatten(1)))
