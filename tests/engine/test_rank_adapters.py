"""Adapters on their way to a rank."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from turbolm.engine.rank_adapters import ReceivedAdapters, encode_module, encode_place
from turbolm.layers.linear import LowRank
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.peft import Adapter


class Places:
    """An `AdaptedDecoder` that notes what comes."""

    def __init__(self) -> None:
        self.held: dict[int, Adapter] = {}

    def put(self, place: int, adapter: Adapter) -> None:
        self.held[place] = adapter


def adapter(seed: int, names: list[str], dtype: torch.dtype) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    modules = {}
    for i, name in enumerate(names):
        a, b = torch.randn(2, 5 + i, generator=random), torch.randn(2, 3 + 2 * i, generator=random)
        modules[name] = LowRank(a.to(dtype), b.to(dtype).T, 0.3 + seed)  # b: not contiguous
    return Adapter(Path(), modules)


def test_adapters_arrive_as_sent() -> None:
    """Two, one after the other: nothing of the first is left in the second."""
    places = Places()
    received = ReceivedAdapters(cast(AdaptedDecoder, places))
    sent = {1: adapter(0, ["a", "b"], torch.float32), 0: adapter(1, ["b", "c"], torch.bfloat16)}
    for place, own in sent.items():
        for name, module in own.modules.items():
            received.take(memoryview(b"".join(encode_module(name, module))))
        received.put(memoryview(b"".join(encode_place(place))))
    assert places.held.keys() == sent.keys()
    for place, own in sent.items():
        found = places.held[place].modules
        assert found.keys() == own.modules.keys()
        for name, module in own.modules.items():
            assert torch.equal(found[name].a_rk, module.a_rk) and found[name].a_rk.dtype == module.a_rk.dtype
            assert torch.equal(found[name].b_nr, module.b_nr) and found[name].scale == module.scale
