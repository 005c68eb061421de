"""The range of each head's keys and values, as calibration found it: kv_scales.json beside a model's files.

    {"format": "turbolm-kv-scales", "version": 1, "tokens": 10240, "data": "chats.jsonl",
     "layers": [{"k": [[minimum, maximum], … for each head], "v": […]}, …]}

Keys are as they are stored, rotated. With int8, code = (x - minimum) / (maximum - minimum) * 255, kept in 0 … 255.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import CheckpointError, ConfigError
from turbolm.kv import KvFormat, KvShape

NAME = "kv_scales.json"
_FORMAT, _VERSION = "turbolm-kv-scales", 1

#: (minimum, maximum) of each head.
Ranges = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class LayerRanges:
    k: Ranges
    v: Ranges

    def part(self, index: int, count: int) -> LayerRanges:
        """The index-th of `count` equal parts of the heads."""
        size = len(self.k) // count
        heads = slice(index * size, (index + 1) * size)
        return LayerRanges(self.k[heads], self.v[heads])


def scales_path(model: Path) -> Path:
    """Where the scales of a model's folder, or of a .gguf file, lie."""
    return model / NAME if model.is_dir() else model.with_suffix(f".{NAME}")


def find_scales(model: Path) -> str:
    """The path of the model's scales; "" where there are none."""
    path = scales_path(model)
    return str(path) if path.is_file() else ""


def choose_scales(wanted: str, found: str, kv: KvFormat, reasons: list[str]) -> str:
    """The path of the scales that are used, "" for none; `wanted`: "auto", "off" or a path; `found`: the model's.
    Raises ConfigError for a path where nothing is stored as int8."""
    has_int8 = "int8" in (kv.k, kv.v)
    if wanted not in ("auto", "off") and not has_int8:
        raise ConfigError(f"kv_scales is {wanted!r}, and kv is '{kv}': static scales are for int8; set kv to 'int8'")
    path = {"auto": found if has_int8 else "", "off": ""}.get(wanted, wanted)
    if path:
        reasons.append(f"KV cache: static scales of int8 from {path}")
    return path


def write_scales(path: Path, layers: Sequence[LayerRanges], num_tokens: int, data: str) -> None:
    """Raises ConfigError where `path` can't be written."""
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "tokens": num_tokens,
        "data": data,
        "layers": [{"k": layer.k, "v": layer.v} for layer in layers],
    }
    part = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from None


def read_scales(path: Path, shapes: Sequence[KvShape]) -> tuple[LayerRanges, ...]:
    """Those of a model whose layers have these shapes. Raises CheckpointError where the file is broken or another
    model's, with what to do."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"it is not valid JSON ({error})") from None
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (_FORMAT, _VERSION):
        raise _broken(path, f"it is not of the format {_FORMAT}, version {_VERSION}")
    layers = record.get("layers")
    if not isinstance(layers, list) or len(layers) != len(shapes):
        found = len(layers) if isinstance(layers, list) else "no"
        raise _broken(path, f"it has {found} layers, the model {len(shapes)}")
    return tuple(
        LayerRanges(*(_ranges(path, f"layer {index}, {side}", layer, side, shape.num_heads) for side in ("k", "v")))
        for index, (layer, shape) in enumerate(zip(layers, shapes, strict=True))
    )


def _ranges(path: Path, where: str, layer: Any, side: str, num_heads: int) -> Ranges:
    pairs = layer.get(side) if isinstance(layer, dict) else None
    if not isinstance(pairs, list) or len(pairs) != num_heads:
        raise _broken(path, f"{where}: it must have {num_heads} heads")
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(x) in (int, float) for x in pair)
        if not is_pair or not all(map(math.isfinite, pair)) or pair[0] > pair[1]:
            raise _broken(path, f"{where}: {str(pair)[:60]} is no minimum and maximum")
    return tuple((float(low), float(high)) for low, high in pairs)


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}. Make it again (turbolm quantize kv MODEL), delete it, or set kv_scales to 'off'"
    )
