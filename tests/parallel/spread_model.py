"""A tiny model over processes on the CPU, and what it answers."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from turbolm.config import EngineConfig, ResolvedConfig, resolve
from turbolm.engine.build import Draft, EngineParts, build, model_needs
from turbolm.engine.engine import Engine
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.ops.hardware import probe
from turbolm.types import Output, Request, SamplingParams

VOCABULARY = 89


def built(
    folder: Path, tensor_parallel: int, draft: Path | None = None, speculation: bool = False, **given: Any
) -> tuple[EngineParts, ResolvedConfig]:
    """`speculation` is on although the kernels, plain PyTorch, may round by the number of rows."""
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    options = EngineConfig(
        device="cpu", kernels="reference", dtype="float32", tensor_parallel=tensor_parallel, block_size=8,
        max_batch_tokens=32, max_batch_size=8, kv_memory="1M", threads=1, **given,
    )  # fmt: skip
    config = resolve(options, model_needs("tiny", checkpoint, spec, tensor_parallel), probe())
    config = replace(config, speculation=speculation, draft_cost=0.01)
    small = None
    if draft is not None:
        own = open_checkpoint(draft)
        small = Draft(own, decoder_spec(own.config))
    return build(checkpoint, spec, config, VOCABULARY, draft=small), config


class Served:
    """An engine with what it has delivered."""

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.deltas: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self.engine = Engine(
            parts.scheduler,
            parts.runner,
            lambda outputs: [self.deltas.put(o) for o in outputs],
            adapters=parts.adapters,
        )

    def answers(self, requests: list[Request]) -> dict[str, Output]:
        """The last output of each, which has everything."""
        self.engine.submit(requests, deltas=False)
        outputs = [self.deltas.get(timeout=60) for _ in requests]
        return {output.request_id: output for output in outputs}


def asked(variants: dict[str, SamplingParams], lengths: tuple[int, ...], **given: Any) -> list[Request]:
    """A request of each variant, with a prompt of each length."""
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            f"{name} {length}", tuple(torch.randint(0, 89, (length,), generator=generator).tolist()), params, **given
        )
        for length in lengths
        for name, params in variants.items()
    ]


def assert_same_answers(requests: list[Request], served: list[Served]) -> dict[str, Output]:
    expected, found = (own.answers(requests) for own in served)
    for name, output in found.items():
        assert output.error is None and expected[name].error is None
        assert output.token_ids == expected[name].token_ids, name
    return found


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "turbolm.engine.rank" in " ".join(child.cmdline())
    ]
