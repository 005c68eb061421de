"""What a rung costs: memory as the engine holds it, speed as it was measured on the user's own prompts."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from turbolm.bench.workload import random_tokens
from turbolm.config import ResolvedConfig
from turbolm.llm import AsyncLLM
from turbolm.types import SamplingParams

_ANSWER = 64  # tokens of the answers that are timed
_FIRST_PROMPT = 512  # tokens of the prompt whose first token is timed
_ROUNDS = 3
_KV_SHARE = 0.9  # of the memory beside the weights; the rest is working memory


@dataclass(frozen=True, slots=True)
class Cost:
    weight_bytes: int
    kv_bytes_per_token: int
    max_context: int
    streams: int  # answers at once under load
    load_seconds: float
    first_token_seconds: float  # after a prompt of 512 tokens
    tokens_per_second: float  # one answer at a time
    tokens_per_second_load: float  # `streams` at once, together
    engine: str = ""  # device, kernels and dtype that it ran with

    def kv_tokens(self, memory: int) -> int:
        """Tokens of KV cache that fit into so many bytes beside the weights."""
        return max(0, int((memory - self.weight_bytes) * _KV_SHARE) // self.kv_bytes_per_token)

    def num_sequences(self, memory: int, context: int) -> int:
        """Sequences of that length that fit at once."""
        return self.kv_tokens(memory) // context

    def memory(self, context: int) -> int:
        """Bytes of weights, and of the KV cache of `streams` sequences of that length."""
        return self.weight_bytes + self.streams * context * self.kv_bytes_per_token


async def measure(llm: AsyncLLM, prompts: Sequence[Sequence[int]], streams: int, load_seconds: float) -> Cost:
    """Medians of three rounds. `prompts`: token ids; those of the user's items."""
    config = llm.config
    await llm.wait_until_warm()
    room = max(1, config.max_context - _ANSWER)
    cut = [list(prompt[-min(room, _FIRST_PROMPT) :]) for prompt in prompts]
    many = [cut[number % len(cut)] for number in range(streams)]
    rng = np.random.default_rng(0)
    length = min(_FIRST_PROMPT, config.max_context - 1)
    firsts, alone, loads = [], [], []
    for number in range(_ROUNDS):
        fresh = random_tokens(rng, llm.tokenizer.vocab_size, length)  # that no prefix cache knows
        start = time.perf_counter()
        await _answer(llm, fresh, 1)
        firsts.append(time.perf_counter() - start)
        alone.append(await _tokens_per_second(llm, [cut[number % len(cut)]]))
        loads.append(await _tokens_per_second(llm, many))
    return Cost(
        weight_bytes=config.weight_bytes,
        kv_bytes_per_token=config.kv_bytes_per_token,
        max_context=config.max_context,
        streams=streams,
        load_seconds=load_seconds,
        first_token_seconds=statistics.median(firsts),
        tokens_per_second=statistics.median(alone),
        tokens_per_second_load=statistics.median(loads),
        engine=f"{config.device}, {config.kernels} kernels, {config.dtype}",
    )


def default_streams(config: ResolvedConfig) -> int:
    """For `LadderConfig.streams` 0."""
    return min(16 if config.device == "cpu" else 64, config.max_batch_size)


async def _tokens_per_second(llm: AsyncLLM, prompts: Sequence[Sequence[int]]) -> float:
    """Of all answers together, from when every one has its first token."""
    times = await asyncio.gather(*(_answer(llm, prompt, _ANSWER) for prompt in prompts))
    begin = max(own[0] for own in times)
    late = [moment for own in times for moment in own if moment > begin]
    return len(late) / (max(late) - begin) if late else 0.0


async def _answer(llm: AsyncLLM, prompt: Sequence[int], length: int) -> list[float]:
    """When its tokens came."""
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    times: list[float] = []
    async for delta in llm.generate(prompt, params):
        if delta.error is not None:
            raise delta.error
        times += [time.perf_counter()] * len(delta.token_ids)
    return times
