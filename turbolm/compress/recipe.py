"""`Recipe`: what to make of a model's weights, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from turbolm.errors import ConfigError, nearest

Method = Literal["awq", "gptq", "int8", "fp8", "rtn"]
FileFormat = Literal["auto", "awq", "gptq", "compressed-tensors"]
WeightFormat = Literal["int4", "int8", "fp8"]
Order = Literal["static", "group", "none"]

#: What each method makes.
METHODS: Mapping[Method, WeightFormat] = {"awq": "int4", "gptq": "int4", "int8": "int8", "fp8": "fp8", "rtn": "int4"}
_NEED_DATA = ("awq", "gptq", "int8")
_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantize a model. Raises ConfigError for values that can't be used."""

    method: Method
    """awq, gptq and rtn make int4 weights; int8 and fp8 make 8-bit weights for 8-bit activations."""
    format: FileFormat = "auto"
    """How the weights are written: "awq" (AutoAWQ's gemm packing), "gptq" or "compressed-tensors". "auto":
    the method's own; compressed-tensors where it has none."""
    group_size: int = 0
    """Input columns that share a scale, of int4: 32, 64 or 128; -1: a whole row; 0: the largest of these that fits."""
    bits: int = 4
    """Bits of a weight where the method makes integers in groups: 4."""
    symmetric: bool = False
    """Zero point in the middle of the range: slightly faster on some engines, slightly worse."""
    order: Order = "static"
    """In which order GPTQ rounds columns: "static" (by activation, groups stay in place), "group" (by activation,
    groups follow it: the file needs an index, and kernels run slower) or "none" (from left to right)."""
    damping: float = 0.01
    """What GPTQ adds to the Hessian's diagonal, as a part of its mean."""
    data: str = ""
    """Calibration data: a .jsonl file (lines with "messages", "prompt" or "text"), a .txt file or hf:dataset.
    Default: a small text in many languages that comes with turbolm."""
    samples: int = 128
    """Most samples taken from the data."""
    context: int = 512
    """Longest sample, in tokens; longer ones are cut, plain text is cut into pieces of this length."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is computed."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("format", get_args(FileFormat)),
            ("order", get_args(Order)),
            ("device", ("auto", "cpu", "cuda")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.{nearest(str(value), allowed)}")
        for name in ("samples", "context"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, got {value!r}")
        if self.bits != 4:
            raise ConfigError(f"bits is {self.bits!r}; allowed: 4. For 8 bits use the method int8 or fp8")
        if self.group_size not in (-1, 0, *_GROUP_SIZES):
            raise ConfigError(f"group_size is {self.group_size!r}; allowed: 32, 64, 128, -1 (a whole row)")
        if not isinstance(self.damping, float) or not 0 < self.damping <= 1:
            raise ConfigError(f"damping must be a number above 0, up to 1, got {self.damping!r}")
        if self.weight_format == "int4":
            if self.order == "group" and self.method == "gptq" and self.file_format != "gptq":
                raise ConfigError(f"order 'group' needs the format 'gptq', not '{self.format}'; or use order 'static'")
            return
        if self.format not in ("auto", "compressed-tensors"):
            raise ConfigError(
                f"format '{self.format}' holds int4 weights; {self.method} is written as compressed-tensors"
            )
        if self.group_size not in (-1, 0) or self.symmetric:
            raise ConfigError(f"{self.method} has one scale per output row: group_size and symmetric are for int4")

    @classmethod
    def of(cls, method: str, **options: object) -> Recipe:
        """A recipe with `options` changed from the defaults; unknown names are refused."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"unknown quantization option '{name}'.{nearest(name, known)} Known: {', '.join(known)}"
                )
        return cls(method, **options)  # type: ignore[arg-type]

    @property
    def weight_format(self) -> WeightFormat:
        return METHODS[self.method]

    @property
    def needs_data(self) -> bool:
        return self.method in _NEED_DATA

    @property
    def file_format(self) -> str:
        """ "auto" decided."""
        if self.format != "auto":
            return self.format
        return self.method if self.method in ("awq", "gptq") else "compressed-tensors"

    def fitted(self, widths: Sequence[tuple[str, int]]) -> Recipe:
        """The group size decided for matrices (name, input columns). Raises ConfigError where one isn't a
        whole number of groups."""
        if self.weight_format != "int4":
            return self
        fitting = [size for size in _GROUP_SIZES if all(k % size == 0 for _, k in widths)]
        if self.group_size == 0:
            return replace(self, group_size=fitting[0] if fitting else -1)
        wrong = next((item for item in widths if self.group_size > 0 and item[1] % self.group_size), None)
        if wrong:
            choice = ", ".join(str(size) for size in (*fitting, -1))
            raise ConfigError(
                f"group_size {self.group_size} doesn't divide the {wrong[1]} input columns of {wrong[0]}; "
                f"this model allows {choice}"
            )
        return self
