"""A group of modules in the quantization_config of compressed-tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from turbolm.quant.fp8 import BLOCK
from turbolm.quant.method import Fields

Format = Literal["int4", "int8", "fp8"]

#: How each format is written.
LAYOUTS: dict[Format, str] = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
_READABLE = (*LAYOUTS.values(), "naive-quantized")
_SILENT = frozenset(["observer", "observer_kwargs", "scale_dtype", "zp_dtype"])


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are stored."""

    targets: tuple[str, ...]  # module names, "re:…" patterns of them, or class names such as "Linear"
    format: Format
    group_size: int = -1  # columns that share a scale; -1: all of a row
    is_symmetric: bool = True
    has_blocks: bool = False  # scales of fp8 are for blocks of 128 x 128
    activations: Literal["none", "dynamic", "static"] = "none"  # how they are rounded: to 8 bits, per token or tensor
    has_order: bool = False  # columns may be grouped in another order than the input's

    def matches(self, prefix: str) -> bool:
        """Whether a target names the module itself."""
        return any(fits(target, prefix) for target in self.targets)


def fits(pattern: str, prefix: str) -> bool:
    """Whether an entry of `targets` or `ignore` is this module, or a pattern that fits its name from the start."""
    return bool(re.match(pattern[3:], prefix)) if pattern.startswith("re:") else pattern == prefix


def check_patterns(fields: Fields, name: str, patterns: tuple[str, ...]) -> None:
    """Raises UnsupportedModelError for a pattern that is no regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise fields.refusal(name, pattern, ("regular expressions",)) from error


def read_scheme(where: str, values: object, default_layout: str) -> Scheme:
    """The scheme in `values`, which `where` in quantization_config has; `default_layout`: the format of schemes that
    don't name one. Raises UnsupportedModelError naming a field that turbolm can't follow."""
    group = Fields(values, f"quantization_config (compressed-tensors), {where},")
    targets = group.names("targets")
    check_patterns(group, "targets", targets)
    layout = group.choice("format", _READABLE, default_layout)
    activations = _read_activations(group)
    if group.get("output_activations"):
        raise group.refusal("output_activations", group.get("output_activations"), (None,))
    weights = Fields(group.get("weights"), f"{group.where} weights")
    group.finish()
    bits, kind = weights.choice("num_bits", (4, 8)), weights.choice("type", ("int", "float"), "int")
    strategies = ("tensor", "channel", "block") if kind == "float" else ("channel", "group")
    strategy = weights.choice("strategy", strategies)
    has_zeros = not weights.flag("symmetric", True)
    weights.choice("dynamic", (False,), False)
    order = weights.choice("actorder", ("weight", "static", "group", "dynamic", False), False)
    group_size = weights.group_size() if strategy == "group" else -1
    block = weights.get("block_structure")
    weights.get("group_size")
    weights.finish(_SILENT)
    if strategy == "block" and block != [BLOCK, BLOCK]:
        raise weights.refusal("block_structure", block, ([BLOCK, BLOCK],))
    if kind == "float" and bits != 8:
        raise weights.refusal("num_bits", bits, (8,))
    if has_zeros and (bits, kind) != (4, "int"):
        raise weights.refusal("symmetric", False, (True,))
    if (kind == "float") != (layout == "float-quantized") and layout != "naive-quantized":
        raise group.refusal(
            "format", layout, ("float-quantized",) if kind == "float" else ("pack-quantized", "int-quantized")
        )
    if bits == 4 and layout != "pack-quantized":
        raise group.refusal("format", layout, ("pack-quantized",))
    name: Format = "fp8" if kind == "float" else "int4" if bits == 4 else "int8"
    return Scheme(
        targets, name, group_size, not has_zeros, strategy == "block", activations, order in ("group", "dynamic")
    )


def _read_activations(group: Fields) -> Literal["none", "dynamic", "static"]:
    values = group.get("input_activations")
    if not values:
        return "none"
    fields = Fields(values, f"{group.where} input_activations")
    fields.choice("num_bits", (8,))
    return "dynamic" if fields.get("dynamic", False) else "static"


def write_scheme(scheme: Scheme) -> dict[str, Any]:
    """A member of config_groups."""
    kind, bits = ("float" if scheme.format == "fp8" else "int"), (4 if scheme.format == "int4" else 8)
    strategy = "block" if scheme.has_blocks else "channel" if scheme.group_size == -1 else "group"
    is_dynamic = scheme.activations == "dynamic"
    activations = {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "token" if is_dynamic else "tensor",
        "dynamic": is_dynamic,
    }
    return {
        "targets": list(scheme.targets),
        "format": LAYOUTS[scheme.format],
        "weights": {
            "num_bits": bits,
            "type": kind,
            "symmetric": scheme.is_symmetric,
            "strategy": strategy,
            "group_size": None if scheme.group_size == -1 else scheme.group_size,
            "dynamic": False,
        }
        | ({"block_structure": [BLOCK, BLOCK]} if scheme.has_blocks else {}),
        "input_activations": None if scheme.activations == "none" else activations,
        "output_activations": None,
    }
