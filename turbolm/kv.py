"""How keys and values are stored between steps.

    float32, bfloat16, float16   as they are
    int8, int4                   codes, with a scale and a minimum (float16) of each head and token
    fp8                          float8 e4m3, saturated to ±448

`ops.LayerCache` says how each is laid out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from turbolm.errors import ConfigError, nearest

KvKind = Literal["float32", "bfloat16", "float16", "int8", "int4", "fp8"]

KINDS: tuple[KvKind, ...] = get_args(KvKind)
LEVELS = {"int8": 255, "int4": 15}  # the largest code of kinds that have codes
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4, "fp8": 8}
_SCALE_BYTES = 4  # scale and minimum of a head and token, where there are codes
_MULTIPLES = {"int8": 8, "fp8": 8, "int4": 16}  # of head sizes: kernels read pairs of codes as one number


@dataclass(frozen=True, slots=True)
class KvFormat:
    """The kinds of keys and of values, and of both in `skipped` layers."""

    k: KvKind
    v: KvKind
    plain: KvKind
    skipped: tuple[int, ...] = ()

    @classmethod
    def both(cls, kind: KvKind) -> KvFormat:
        """One kind for everything."""
        return cls(kind, kind, kind)

    def of_layer(self, index: int) -> tuple[KvKind, KvKind]:
        """The kinds of a layer's keys and values."""
        return (self.plain, self.plain) if index in self.skipped else (self.k, self.v)

    @property
    def is_quantized(self) -> bool:
        return self.k in _MULTIPLES or self.v in _MULTIPLES

    @property
    def kinds(self) -> set[KvKind]:
        """All that occur."""
        return {self.k, self.v, *((self.plain,) if self.skipped else ())}

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}:k,{self.v}:v"


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's keys and values of a token. (Multi-head latent attention: one head whose k is the latent with
    its rotary part, and whose v is the latent.)"""

    num_heads: int
    head_dim: int
    v_head_dim: int

    def bytes_per_token(self, kind_k: KvKind, kind_v: KvKind) -> int:
        """Scales included."""
        return self.num_heads * (_head_bytes(kind_k, self.head_dim) + _head_bytes(kind_v, self.v_head_dim))


def _head_bytes(kind: KvKind, dim: int) -> int:
    return dim * _BITS[kind] // 8 + (_SCALE_BYTES if kind in LEVELS else 0)


def bytes_per_token(shapes: tuple[KvShape, ...], kv: KvFormat) -> int:
    """Of all layers, scales included."""
    return sum(shape.bytes_per_token(*kv.of_layer(i)) for i, shape in enumerate(shapes))


def parse_kinds(text: str) -> tuple[KvKind | None, KvKind | None]:
    """`auto`, `int8` or `int8:k,int4:v` → the kinds of keys and of values; None: nothing is said of them. Raises
    ConfigError."""
    if text == "auto":
        return None, None
    found: dict[str, KvKind] = {}
    for part in text.split(","):
        kind, colon, side = (piece.strip() for piece in part.partition(":"))
        if kind not in KINDS:
            allowed = ("auto", *KINDS)
            raise ConfigError(
                f"kv is {text!r}; allowed: {', '.join(allowed)}, or two of them, such as 'int8:k,int4:v'."
                f"{nearest(kind, allowed)}"
            )
        sides = (side,) if colon else ("k", "v")
        if not set(sides) <= {"k", "v"} or found.keys() & set(sides):
            raise ConfigError(f"kv is {text!r}; name keys and values once each, such as 'int8:k,int4:v'")
        found |= dict.fromkeys(sides, kind)
    return found.get("k"), found.get("v")


def parse_layers(text: str) -> tuple[int, ...]:
    """`0,1,-1` → those numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch(r"-?\d{1,6}", part) for part in parts):
        raise ConfigError(f"kv_skip_layers is {text!r}; give layers by number, such as '0,1,-1' (-1: the last)")
    return tuple(int(part) for part in parts)


def resolve_format(kv: str, skip_layers: str, plain: KvKind, shapes: tuple[KvShape, ...]) -> KvFormat:
    """What the options mean for a model whose layers have these shapes. Raises ConfigError where they don't fit it."""
    k, v = parse_kinds(kv)
    count = len(shapes)
    layers = parse_layers(skip_layers)
    for layer in layers:
        if not -count <= layer < count:
            raise ConfigError(
                f"kv_skip_layers is {skip_layers!r}, and the model has {count} layers: 0 to {count - 1}, "
                f"or -{count} to -1"
            )
    found = KvFormat(k or plain, v or plain, plain, tuple(sorted({layer % count for layer in layers})))
    if layers and not found.is_quantized:
        raise ConfigError(
            f"kv_skip_layers is {skip_layers!r}, but kv is {kv!r}, which leaves all layers as they are; "
            "set kv to int8, int4 or fp8 too"
        )
    for index, shape in enumerate(shapes):
        for kind, dim in zip(found.of_layer(index), (shape.head_dim, shape.v_head_dim), strict=True):
            if dim % _MULTIPLES.get(kind, 1):
                works = [name for name in KINDS if dim % _MULTIPLES.get(name, 1) == 0 and name in (plain, *_MULTIPLES)]
                raise ConfigError(
                    f"kv is {kv!r}: {kind} takes heads of a multiple of {_MULTIPLES[kind]}, and layer {index} of the "
                    f"model has heads of {dim}; use {' or '.join(works)}"
                )
    return found
