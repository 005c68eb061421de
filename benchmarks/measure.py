"""What the CPU benchmarks time, in one place: the workloads, turbolm's side of them, and the record of a run.

Prompts are random token ids with fixed seeds; answers are greedy and run on past end-of-text, so that
every engine computes the same numbers of tokens.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbolm import LLM, SamplingParams, __version__
from turbolm.ops.hardware import probe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Workload:
    """`streams` prompts of `prompt` tokens at once, `answer` tokens each."""

    name: str
    streams: int
    prompt: int
    answer: int

    @property
    def is_prefill(self) -> bool:
        return self.answer == 1

    def prompts(self, vocab_size: int, round_: int = 0) -> list[list[int]]:
        """Fresh prompts for each round, so that no prefix cache helps."""
        rng = np.random.default_rng([self.streams, self.prompt, round_])
        return [rng.integers(10, vocab_size - 300, self.prompt).tolist() for _ in range(self.streams)]


def decode(streams: int, context: int = 32, answer: int = 96) -> Workload:
    return Workload(f"decode, {streams} streams after {context}", streams, context, answer)


PREFILL = Workload("prefill 512", 1, 512, 1)


def run_turbolm(llm: LLM, work: Workload, round_: int) -> float:
    """Tokens per second: of the prompt for prefill; else of the answers, from when every stream has its
    first token."""
    params = SamplingParams(temperature=0, max_tokens=work.answer, ignore_eos=True)
    prompts = work.prompts(llm.tokenizer.vocab_size, round_)
    start = time.perf_counter()
    first: dict[int, float] = {}
    count, counted_from = 0, start
    for number, delta in llm.stream_many(prompts, params):
        now = time.perf_counter()
        if number not in first:
            first[number] = counted_from = now
            count = 0
        else:
            count += len(delta.token_ids)
    if work.is_prefill:
        return work.streams * work.prompt / (first[0] - start)
    return count / (time.perf_counter() - counted_from)


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    hardware = probe()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": hardware.cpu,
        "cores": hardware.physical_cores,
        "isa": list(hardware.isa),
        "native": hardware.native,
        "memory": hardware.total_memory,
        "python": platform.python_version(),
        "turbolm": __version__,
    }


def save(name: str, record: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def config_of(llm: LLM) -> dict[str, Any]:
    return asdict(llm.config)
