"""Rungs: combinations of weights and KV cache, how they are spelled, and which ones are tried by default."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from turbolm.errors import ConfigError, nearest

ROUNDED = ("int4", "int8", "fp8")  # weights that are rounded while the model is loaded
CALIBRATED = ("awq", "gptq")  # weights that are made from calibration data first
_GROUP_SIZES = ("32", "64", "128")
_PARTS = ("weights", "kv", "skip", "model")
AUTO = "auto"  # of `Rung.skip`


@dataclass(frozen=True, slots=True)
class Rung:
    """What is changed of the base. All fields at their defaults: the base itself."""

    weights: str = ""
    """ "int4", "int8" or "fp8"; "awq" or "gptq", with a group size if need be: "awq:64"."""
    kv: str = ""
    """As `EngineConfig.kv`."""
    skip: str = ""
    """Layers that keep their KV cache in 16 bits, as `EngineConfig.kv_skip_layers`; "auto": they are to be found."""
    model: str = ""
    """Another checkpoint in place of the base's."""

    @property
    def name(self) -> str:
        parts = [f"{part}={getattr(self, part)}" for part in _PARTS if getattr(self, part)]
        return "+".join(parts) or "base"

    @property
    def title(self) -> str:
        """For people."""
        words = [self.model] if self.model else []
        if self.weights:
            method, _, group = self.weights.partition(":")
            words.append(
                f"{method.upper() if method in CALIBRATED else method} weights{f', groups of {group}' if group else ''}"
            )
        if self.kv:
            words.append(f"KV {self.kv}{self._exceptions}")
        return " + ".join(words) or "base"

    @property
    def _exceptions(self) -> str:
        if not self.skip:
            return ""
        count = self.skip.count(",") + 1
        if self.skip == AUTO:
            return " but for some layers"
        return f" but for layer {self.skip}" if count == 1 else f" but for {count} layers"

    @property
    def is_base(self) -> bool:
        return self == Rung()

    @property
    def method(self) -> str:
        """The calibration method that makes its weights; empty: none."""
        method = self.weights.partition(":")[0]
        return method if method in CALIBRATED else ""

    @property
    def group_size(self) -> int:
        """Of calibrated weights; 0: what fits the model."""
        return int(self.weights.partition(":")[2] or 0)

    @property
    def engine_options(self) -> dict[str, str]:
        """Fields of EngineConfig that differ from the base's."""
        options = {"weights": "" if self.method else self.weights, "kv": self.kv, "kv_skip_layers": self.skip}
        return {name: value for name, value in options.items() if value}

    def includes(self, other: Rung) -> bool:
        """Whether all that `other` changes is changed here, too."""
        if other.is_base or (other.kv and self.skip not in ("", other.skip)):
            return False  # layers that keep 16 bits here, and perhaps not there
        return all(getattr(other, part) in ("", getattr(self, part)) for part in ("weights", "kv", "model"))


def parse_rung(text: str) -> Rung:
    """`base`, `kv=int8`, `weights=awq:64+kv=int8`, `kv=int4+skip=0,-1`, `model=./folder`. ConfigError."""
    if text == "base":
        return Rung()
    found: dict[str, str] = {}
    rest = text
    while rest:
        name, equals, value = rest.partition("=")
        if name not in _PARTS or not equals or name in found:
            raise ConfigError(
                f"can't read the rung '{text}'.{nearest(name, _PARTS)} Rungs are base, or changes joined by '+': "
                "kv=int8, weights=awq, weights=awq:64+kv=int8, kv=int4+skip=0,-1, kv=int4+skip=auto, model=./folder"
            )
        value, _, rest = (value, "", "") if name == "model" else value.partition("+")
        found[name] = value
    rung = Rung(**found)
    _check(rung, text)
    return rung


def _check(rung: Rung, text: str) -> None:
    method, colon, group = rung.weights.partition(":")
    if rung.weights and method not in (*ROUNDED, *CALIBRATED):
        allowed = (*ROUNDED, *CALIBRATED)
        raise ConfigError(
            f"the rung '{text}' has weights '{method}'; allowed: {', '.join(allowed)}.{nearest(method, allowed)}"
        )
    if colon and (method not in CALIBRATED or group not in _GROUP_SIZES):
        raise ConfigError(f"the rung '{text}' has groups of '{group}'; awq and gptq take {', '.join(_GROUP_SIZES)}")
    if rung.model and rung.weights:
        raise ConfigError(f"the rung '{text}' names a model and weights: quantize that model first, or leave one out")
    if rung.skip and not rung.kv:
        raise ConfigError(f"the rung '{text}' skips layers of a KV cache that isn't quantized: add kv=int8 or another")


def default_rungs(*, is_packed: bool) -> tuple[Rung, ...]:
    """The four steps: the model as it is, its KV cache quantized, its weights quantized, both. A checkpoint whose
    weights are packed already has the first two."""
    steps = (Rung(), Rung(kv="int8"), Rung(weights="awq"), Rung(weights="awq", kv="int8"))
    return tuple(rung for rung in steps if not (is_packed and rung.weights))


def all_rungs(*, is_packed: bool) -> tuple[Rung, ...]:
    """Every combination, from the mildest to the strongest."""
    weights = ("",) if is_packed else ("", "int8", "fp8", "awq")
    kinds = ("", "fp8", "int8", "int4")
    return tuple(Rung(weights=weight, kv=kv) for weight in weights for kv in kinds)


def read_rungs(text: str, *, is_packed: bool) -> tuple[Rung, ...]:
    """The rungs that `LadderConfig.rungs` names, the base first. ConfigError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"can't read the rungs {text!r}: {error}") from None
    if not words:
        return default_rungs(is_packed=is_packed)
    if words == ["all"]:
        return all_rungs(is_packed=is_packed)
    return tuple(dict.fromkeys((Rung(), *(parse_rung(word) for word in words))))
