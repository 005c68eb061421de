"""What is timed, and how: prompts of random tokens, and greedy answers that run on past end-of-text, so that every
engine computes the same numbers of tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbolm.llm import LLM
from turbolm.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """`streams` prompts of `prompt` tokens at once, `answer` tokens each."""

    name: str
    streams: int
    prompt: int
    answer: int

    @property
    def is_prefill(self) -> bool:
        return self.answer == 1

    @property
    def num_tokens(self) -> int:
        """That the KV cache holds in the end."""
        return self.streams * (self.prompt + self.answer)

    def prompts(self, vocab_size: int, round_: int = 0) -> list[list[int]]:
        """Fresh prompts for each round, so that no prefix cache helps."""
        rng = np.random.default_rng([self.streams, self.prompt, round_])
        return [random_tokens(rng, vocab_size, self.prompt) for _ in range(self.streams)]


def decode(streams: int, context: int = 32, answer: int = 96) -> Workload:
    return Workload(f"decode, {streams} streams after {context}", streams, context, answer)


def prefill(prompt: int) -> Workload:
    return Workload(f"prefill {prompt}", 1, prompt, 1)


PREFILL = prefill(512)


def random_tokens(rng: np.random.Generator, vocab_size: int, count: int) -> list[int]:
    """Token ids without the ends of the vocabulary, where control tokens are."""
    low, high = (10, vocab_size - 300) if vocab_size > 1000 else (0, vocab_size)
    tokens: list[int] = rng.integers(low, high, count).tolist()
    return tokens


def run(llm: LLM, work: Workload, round_: int) -> float:
    """Tokens per second of the workload with the prompts of that round, as `run_prompts` counts them."""
    return run_prompts(llm, work.prompts(llm.tokenizer.vocab_size, round_), work.answer)


def run_prompts(llm: LLM, prompts: Sequence[Sequence[int]], answer: int) -> float:
    """Tokens per second: of the prompts where `answer` is 1; else of the answers, from when every stream has its
    first token."""
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    start = time.perf_counter()
    first: dict[int, float] = {}
    count, counted_from = 0, start
    for number, delta in llm.stream_many(prompts, params):
        if delta.error is not None:
            raise delta.error
        now = time.perf_counter()
        if number not in first:
            first[number] = counted_from = now
            count = 0
        else:
            count += len(delta.token_ids)
    if answer == 1:
        return sum(map(len, prompts)) / (max(first.values()) - start)
    return count / (time.perf_counter() - counted_from)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The values of several rounds, and what of them is shown."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}
