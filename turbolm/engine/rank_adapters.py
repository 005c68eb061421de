"""LoRA adapters of a model over several ranks: the leading one hands each to the others, between steps.

A matrix is a message, so that none is large; a last one says where all of them belong. Every rank cuts out its part.
"""

from __future__ import annotations

import json
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from turbolm.layers.linear import LowRank
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.peft import Adapter
from turbolm.models.spec import DecoderSpec

_HEAD = struct.Struct("<I")  # bytes of the JSON that follows
_PLACE = struct.Struct("<i")


class OtherRanks(Protocol):
    """The other ranks, which put an adapter into its place after the steps that they were told of before."""

    def put_adapter(self, place: int, adapter: Adapter) -> None: ...
    def watching(self) -> AbstractContextManager[None]: ...


class SpreadAdapters:
    """The leading rank's `AdapterRoom`. For the thread that submits steps."""

    def __init__(self, own: AdaptedDecoder, others: OtherRanks) -> None:
        self._own = own
        self._others = others

    @property
    def num_places(self) -> int:
        return self._own.num_places

    @property
    def max_rank(self) -> int:
        return self._own.max_rank

    @property
    def spec(self) -> DecoderSpec:
        return self._own.spec

    def put(self, place: int, adapter: Adapter) -> None:
        with self._others.watching():
            self._others.put_adapter(place, adapter)
            self._own.put(place, adapter)


class ReceivedAdapters:
    """Another rank's side."""

    def __init__(self, own: AdaptedDecoder | None) -> None:
        """None: there is no room for any, and none come."""
        self._own = own
        self._modules: dict[str, LowRank] = {}  # of the adapter that is on its way

    def take(self, body: memoryview) -> None:
        """A message of `encode_module`."""
        name, module = _decode_module(body)
        self._modules[name] = module

    def put(self, body: memoryview) -> None:
        """A message of `encode_place`: the adapter is complete."""
        assert self._own is not None, "there is room where adapters come"
        self._own.put(_PLACE.unpack(body)[0], Adapter(Path(), self._modules))
        self._modules = {}


def encode_module(name: str, module: LowRank) -> list[bytes]:
    a, b = module.a_rk, module.b_nr
    values = {"name": name, "scale": module.scale, "a": list(a.shape), "b": list(b.shape)}
    head = json.dumps(values | {"dtypes": [str(side.dtype).removeprefix("torch.") for side in (a, b)]}).encode()
    return [_HEAD.pack(len(head)), head, _bytes(a), _bytes(b)]


def encode_place(place: int) -> list[bytes]:
    return [_PLACE.pack(place)]


def _decode_module(body: memoryview) -> tuple[str, LowRank]:
    start = _HEAD.size + _HEAD.unpack_from(body)[0]
    head = json.loads(bytes(body[_HEAD.size : start]))
    sides: list[Tensor] = []
    for name, dtype in zip("ab", head["dtypes"], strict=True):
        kind = getattr(torch, dtype)
        end = start + torch.Size(head[name]).numel() * kind.itemsize
        sides.append(torch.frombuffer(bytearray(body[start:end]), dtype=kind).view(head[name]))
        start = end
    return head["name"], LowRank(sides[0], sides[1], head["scale"])


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
