"""A ladder over the null model, whose rungs are as good or as bad as a test wants."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from turbolm.config import EngineConfig
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import Item, read_item
from turbolm.ladder.climb import Climb, Climber, Load
from turbolm.ladder.config import LadderConfig
from turbolm.ladder.cost import Cost
from turbolm.ladder.rungs import Rung, parse_rung
from turbolm.ladder.sensitivity import find_layers
from turbolm.ladder.store import Store
from turbolm.ladder.subject import Subject
from turbolm.llm import LLM, AsyncLLM
from turbolm.types import SamplingParams

SUBJECT = Subject("null", "null", is_packed=False)


class DamagedLLM(AsyncLLM):
    """Reads other tokens than it is given, and so answers something else."""

    def generate(self, prompt, params=None, **options):
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return super().generate([token ^ 1 for token in ids], params, **options)


class SlowLLM(AsyncLLM):
    """Answers two at a time, each after a pause."""

    async def generate(self, prompt, params=None, **options):
        await asyncio.sleep(0.05)
        async for delta in super().generate(prompt, params, **options):
            yield delta


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int]] = []
        self.said: list[str] = []
        self.num_advanced = 0

    def begin(self, rung: Rung, num_items: int, num_done: int) -> None:
        self.begun.append((rung.name, num_items, num_done))

    def advance(self) -> None:
        self.num_advanced += 1

    def say(self, text: str) -> None:
        self.said.append(text)


def load_null(model: str, engine: EngineConfig, bad: Callable[[EngineConfig], bool]) -> AsyncLLM:
    kind = DamagedLLM if bad(engine) else AsyncLLM
    return kind("null", dataclasses.replace(engine, kv="auto", kv_skip_layers="", weights="auto", max_context=512))


async def cheap_cost(llm: AsyncLLM, prompts: Sequence[Sequence[int]], streams: int, load_seconds: float) -> Cost:
    """Rungs in the order of their names; nothing is timed."""
    return Cost(1_000_000, 1000, 8192, 4, 0.5, 0.1, 10.0, 100.0)


@pytest.fixture(scope="session")
def load_slow() -> Load:
    return lambda model, engine: SlowLLM("null", max_context=512, max_batch_size=1, max_batch_tokens=64)


@pytest.fixture
def climb(tmp_path: Path):
    """climb(items, rungs, config…) → (Climb, Watcher); the store is kept between calls."""

    def run(
        items: Sequence[Item],
        rungs: Sequence[str],
        *,
        bad: Callable[[EngineConfig], bool] = lambda engine: engine.kv == "int4",
        exam: ExamConfig = ExamConfig(max_tokens=8),  # noqa: B008
        load=None,
        find=find_layers,
        engine: EngineConfig = EngineConfig(),  # noqa: B008
        **options: object,
    ) -> tuple[Climb, Watcher]:
        watcher, store = Watcher(), Store(tmp_path / "answers.sqlite")
        load = load or (lambda model, engine: load_null(model, engine, bad))
        try:
            climber = Climber(
                SUBJECT, items, [], LadderConfig(**options), exam, engine, store, watcher,
                load=load, measure=cheap_cost, find=find,
            )  # fmt: skip
            return climber.run([parse_rung(text) for text in rungs]), watcher
        finally:
            store.close()

    return run


@pytest.fixture(scope="session")
def solved() -> Callable[[int], list[Item]]:
    """Items whose references are what the null model answers."""
    with LLM("null", progress=False, max_context=512) as llm:
        prompts = [f"question {number}?" for number in range(330)]
        found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
        answers = [completion.text for completion in found]

    def items(count: int) -> list[Item]:
        rows = zip(prompts[:count], answers, strict=False)
        fields = [{"prompt": prompt, "check": "exact", "reference": answer} for prompt, answer in rows]
        return [read_item(row, line) for line, row in enumerate(fields, 1)]

    return items
