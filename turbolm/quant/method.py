"""Strict reading of a checkpoint's quantization_config, and of the tensors that it describes.

Every field must be read, or be known to say nothing about how weights are stored. Anything else is refused by
name: what turbolm doesn't know would otherwise change the weights silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.weights import WeightSource

ADVICE = "get the unquantized model (turbolm can round it at load: weights='int4'), or a GGUF file of it"
SCALES = ("F16", "BF16", "F32")  # dtypes of scales in files


class Fields:
    """Reads the fields of one object; `finish` refuses what nobody read."""

    def __init__(self, values: object, where: str) -> None:
        """`where`: what the object is called in messages."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} is {str(values)[:80]!r}, not an object; the checkpoint is broken")
        self._values: Mapping[str, Any] = values
        self._read: set[str] = set()
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The value, `default` where it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def choice(self, names: str | tuple[str, ...], allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The value under one of `names`, which must be one of `allowed`; text in lower case."""
        names = (names,) if isinstance(names, str) else names
        given = {name: self.get(name) for name in names}
        name = next((name for name in names if given[name] is not None), names[0])
        value = default if given[name] is None else given[name]
        value = value.lower() if isinstance(value, str) else value
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise self.refusal(name, value, allowed)
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.choice(name, (True, False), default))

    def group_size(self, default: int | None = None) -> int:
        """Columns that share a scale; -1: all of a row."""
        value = self.get("group_size", default)
        if type(value) is not int or (value != -1 and (value < 2 or value % 2)):
            raise self.refusal("group_size", value, ("an even number", -1))
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names, empty where it is absent."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(name, value, ("a list of names",))
        return tuple(value)

    def refusal(self, name: str, value: Any, allowed: Iterable[Any]) -> UnsupportedModelError:
        shown = ", ".join(repr(item) for item in allowed)
        return UnsupportedModelError(
            f"{self.where} has '{name}': {str(value)[:80]!r}; turbolm reads {shown}. Else {ADVICE}"
        )

    def finish(self, silent: Iterable[str] = ()) -> None:
        """Refuse fields that were not read, are not `silent`, and are not switched off."""
        for name, value in self._values.items():
            if name not in self._read and name not in silent and value not in (None, False, {}, []):
                raise UnsupportedModelError(
                    f"{self.where} has a field '{name}' ({str(value)[:80]!r}) that turbolm doesn't know; {ADVICE}"
                )


def read_part(source: WeightSource, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], reason: str) -> Tensor:
    """The tensor `name`. Raises CheckpointError, saying `reason`, where it is absent or has another dtype or shape."""
    info = source.tensors.get(name)
    if info is None:
        raise CheckpointError(f"the checkpoint has no tensor {name}, which {reason}")
    if info.dtype not in dtypes or info.shape != shape:
        raise CheckpointError(
            f"{name} is {info.dtype} {list(info.shape)}; it must be {' or '.join(dtypes)} {list(shape)}: {reason}. "
            "Files and quantization_config don't belong together"
        )
    return source.read(name)


def read_scales(source: WeightSource, name: str, shape: tuple[int, ...], reason: str) -> Tensor:
    """Scales, which must be finite."""
    scales = read_part(source, name, SCALES, shape, reason)
    if not torch.isfinite(scales).all():
        raise CheckpointError(f"{name} holds numbers that are not finite; the file is broken")
    return scales


def words_shape(source: WeightSource, name: str) -> tuple[int, int]:
    """The shape of a matrix of int32 words. Raises CheckpointError where it is none."""
    info = source.tensors[name]
    if info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(f"{name} is {info.dtype} {list(info.shape)}; packed weights are a matrix of I32")
    return info.shape[0], info.shape[1]


def count_groups(name: str, k: int, group_size: int) -> int:
    """Groups of a row of k columns. Raises UnsupportedModelError where these aren't whole."""
    group_size = k if group_size == -1 else group_size
    if k % 2 or k % group_size:
        raise UnsupportedModelError(
            f"{name}: {k} input columns are not whole groups of an even number of them ({group_size}, as "
            f"quantization_config says); {ADVICE}"
        )
    return k // group_size


def read_order(
    source: WeightSource, name: str, k: int, num_groups: int, reason: str, required: bool = False
) -> Tensor | None:
    """int64 [k]: columns by group, from the tensor `name` int32 [k], the group of each column. None where they are in
    order already, or where the tensor is absent (and not `required`) or unset (-1)."""
    if name not in source.tensors and not required:
        return None
    groups = read_part(source, name, ("I32",), (k,), reason).long()
    if (groups == -1).all():
        return None
    in_range = int(groups.min()) >= 0 and int(groups.max()) < num_groups
    if not in_range or (torch.bincount(groups, minlength=num_groups) != k // num_groups).any():
        raise CheckpointError(
            f"{name} must put {k} columns into {num_groups} groups of {k // num_groups} and doesn't; the file is broken"
        )
    return None if (groups.diff() >= 0).all() else torch.argsort(groups, stable=True)
