"""Checkpoints of compressed-tensors (llm-compressor): int4, int8 and fp8 weights, by groups of modules.

pack-quantized    weight_packed int32 [n, ceil(k/8)] (codes + 8; [n, ceil(k/4)], + 128 for 8 bits),
                  weight_scale [n, k/g], weight_zero_point int32 [ceil(n/8), k/g] (packed along rows, + 8),
                  weight_g_idx int32 [k] (the group of each column), weight_shape int64 [2]
int-quantized     weight int8 [n, k], weight_scale [n, 1]
float-quantized   weight float8_e4m3fn [n, k], weight_scale [1] | [n, 1] | [ceil(n/128), ceil(k/128)],
                  input_scale [1] where activations were calibrated
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbolm.errors import CheckpointError, ConfigError, UnsupportedModelError
from turbolm.quant.compressed_scheme import LAYOUTS, Scheme, check_patterns, fits, read_scheme, write_scheme
from turbolm.quant.grouped import group_size as group_size_of
from turbolm.quant.hf_fp8 import detect_fp8, load_fp8
from turbolm.quant.int4 import int4, is_symmetric, symmetric_zeros
from turbolm.quant.int8 import int8
from turbolm.quant.method import ADVICE, Fields, count_groups, read_order, read_part, read_scales, words_shape
from turbolm.quant.nibbles import bytes_of_words, pack_nibbles, unpack_nibbles, words_of_bytes
from turbolm.weights import Weight, WeightSource

log = logging.getLogger(__name__)

_SILENT = frozenset(["quant_method", "global_compression_ratio", "version", "format"])


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """`ignore`: modules (or patterns of them) that are stored dense."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...] = ()
    method = "compressed-tensors"

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(scheme.format for scheme in self.schemes))

    @property
    def has_order(self) -> bool:
        return any(scheme.has_order for scheme in self.schemes)

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        """From a quantization_config. Raises UnsupportedModelError naming a field that turbolm can't follow."""
        fields = Fields(config, "quantization_config (compressed-tensors)")
        fields.choice("quantization_status", ("compressed", "frozen"), "compressed")
        sparsity = Fields(fields.get("sparsity_config", {}), f"{fields.where} sparsity_config")
        sparsity.choice("format", ("dense",), "dense")
        if fields.get("kv_cache_scheme"):
            log.warning("the checkpoint's scales of the KV cache are not used")
        ignore, groups = fields.names("ignore"), fields.get("config_groups")
        check_patterns(fields, "ignore", ignore)
        fields.finish(_SILENT)
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"{fields.where} has no config_groups; the checkpoint is broken")
        default = fields.get("format", "pack-quantized")
        return cls(
            tuple(read_scheme(f"config_groups.{name}", group, default) for name, group in groups.items()), ignore
        )

    def quantization_config(self) -> dict[str, Any]:
        """As llm-compressor writes it."""
        used = {LAYOUTS[scheme.format] for scheme in self.schemes}
        groups = {f"group_{i}": write_scheme(scheme) for i, scheme in enumerate(self.schemes)}
        return {
            "quant_method": self.method,
            "format": used.pop() if len(used) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
        }

    def detect(self, source: WeightSource, prefix: str) -> bool:
        info = source.tensors.get(f"{prefix}.weight")
        has_codes = f"{prefix}.weight_packed" in source.tensors or (info is not None and info.dtype == "I8")
        return has_codes or detect_fp8(source, prefix)

    def load(self, source: WeightSource, prefix: str) -> Weight:
        scheme = self.scheme_of(prefix)
        if f"{prefix}.weight_packed" in source.tensors:
            if scheme.format == "fp8":
                raise _mismatch(f"{prefix}.weight_packed", scheme)
            return _load_packed(source, prefix, scheme)
        if detect_fp8(source, prefix) != (scheme.format == "fp8") or scheme.format == "int4":
            raise _mismatch(f"{prefix}.weight", scheme)
        if scheme.format == "fp8":
            return load_fp8(source, prefix, "weight_scale", scheme.has_blocks)
        return _load_int8(source, prefix, scheme)

    def scheme_of(self, prefix: str) -> Scheme:
        """The scheme of a module: one that names it, else one for all linear layers. Raises CheckpointError where
        there is none."""
        if not any(fits(name, prefix) for name in self.ignore):
            by_class = (scheme for scheme in self.schemes if "Linear" in scheme.targets)
            scheme = next((scheme for scheme in self.schemes if scheme.matches(prefix)), next(by_class, None))
            if scheme is not None:
                return scheme
        raise CheckpointError(
            f"{prefix} is stored quantized, but quantization_config leaves it out (config_groups, ignore); files and "
            "config don't belong together"
        )

    def pack(self, prefix: str, weight: Weight) -> dict[str, Tensor]:
        """The tensors of a matrix in the format of its scheme, by name; `load` gives the same. Raises ConfigError for
        a matrix that the scheme doesn't describe."""
        scheme = self.scheme_of(prefix)
        tensors, (n, k) = weight.tensors, weight.shape
        if weight.format.name != scheme.format:
            raise ConfigError(f"{prefix} is {weight.format.name}, its scheme {scheme.format}")
        if scheme.format == "fp8":
            packed = {"weight": tensors["codes"], "weight_scale": tensors["scales"]}
            if "input_scale" in tensors:
                packed["input_scale"] = tensors["input_scale"].reshape(1)
        else:
            group = k if scheme.group_size == -1 else scheme.group_size
            if group_size_of(weight) != group or k % 8 or "columns" in tensors:
                raise ConfigError(
                    f"{prefix}: compressed-tensors packs {k} columns in groups of {group_size_of(weight)}, whole words "
                    f"of 8 and no order of columns; the scheme has groups of {group}"
                )
            packed = {"weight_scale": tensors["scales"]}
            if scheme.format == "int8":
                packed["weight"] = tensors["codes"]
            else:
                packed["weight_packed"] = words_of_bytes(tensors["codes"])
                packed["weight_shape"] = torch.tensor([n, k])
                if scheme.is_symmetric and not is_symmetric(weight):
                    raise ConfigError(f"{prefix} has zero points other than 8, and its scheme is symmetric")
                if not scheme.is_symmetric:
                    packed["weight_zero_point"] = _pack_zeros(prefix, tensors["zeros"])
        return {f"{prefix}.{name}": tensor for name, tensor in packed.items()}


def _mismatch(name: str, scheme: Scheme) -> CheckpointError:
    return CheckpointError(
        f"{name} is not stored as quantization_config says ({scheme.format}); files and config don't belong together"
    )


def _load_packed(source: WeightSource, prefix: str, scheme: Scheme) -> Weight:
    name = f"{prefix}.weight_packed"
    n, words = words_shape(source, name)
    per_word = 8 if scheme.format == "int4" else 4
    shape = read_part(source, f"{prefix}.weight_shape", ("I64", "I32"), (2,), f"is the shape of {name}").tolist()
    k = shape[1]
    if shape[0] != n or k < 1 or -(-k // per_word) != words:
        raise CheckpointError(
            f"{name} has shape {[n, words]}, which is not {shape} of {scheme.format}; the file is broken"
        )
    num_groups = count_groups(name, k, scheme.group_size)
    reason = f"belongs to groups of {scheme.group_size} in {name}, {shape} of {scheme.format}"
    scales = read_scales(source, f"{prefix}.weight_scale", (n, num_groups), reason)
    codes = bytes_of_words(source.read(name))
    columns = read_order(source, f"{prefix}.weight_g_idx", k, num_groups, reason)
    if scheme.format == "int8":
        if columns is not None:
            raise UnsupportedModelError(f"{prefix}: turbolm reads 8-bit weights without an order of columns; {ADVICE}")
        return int8((codes[:, :k] ^ 128).view(torch.int8), scales)
    zeros = symmetric_zeros(n, num_groups, scales.device)
    if not scheme.is_symmetric:
        shape_of_zeros = (-(-n // 8), num_groups)
        packed = read_part(source, f"{prefix}.weight_zero_point", ("I32",), shape_of_zeros, reason)
        zeros = unpack_nibbles(bytes_of_words(packed.T)).T[:n].contiguous()
    codes = codes[:, : k // 2]
    if columns is not None:
        codes = pack_nibbles(unpack_nibbles(codes).index_select(1, columns))
    return int4(codes, scales, zeros, columns)


def _load_int8(source: WeightSource, prefix: str, scheme: Scheme) -> Weight:
    name, shape = f"{prefix}.weight", source.tensors[f"{prefix}.weight"].shape
    if len(shape) != 2:
        raise CheckpointError(f"{name} has shape {list(shape)}; a matrix [n, k] is needed")
    num_groups = count_groups(name, shape[1], scheme.group_size)
    reason = f"holds the scales of {name} {list(shape)}"
    scales = read_scales(source, f"{prefix}.weight_scale", (shape[0], num_groups), reason)
    return int8(source.read(name), scales)


def _pack_zeros(prefix: str, zeros: Tensor) -> Tensor:
    """uint8 [n, k/g] → int32 [ceil(n/8), k/g]."""
    if int(zeros.max()) > 15:
        raise ConfigError(f"{prefix} has the zero point {int(zeros.max())}; compressed-tensors holds 0..15")
    n, num_groups = zeros.shape
    padded = torch.full((-(-n // 8) * 8, num_groups), 8, dtype=torch.uint8)
    padded[:n] = zeros
    return words_of_bytes(pack_nibbles(padded.T)).T.contiguous()
