"""Fills the KV pool with the longest requests at the largest batch while CUDA graphs are captured.

python benchmarks/gpu_pool.py MODEL [--max-context 8192] [--requests 256] [--answer 200] [--json FILE]

Memory is planned before anything is allocated; this is the proof under load: more requests than the pool holds,
each as long as is allowed, submitted before the first graph is captured. Every request must end with its answer;
the figures are the most memory that was taken, and how often a request was preempted.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import torch
from gpu_record import add_engine_options, engine_options, exit_with, start_record, write

from turbolm import AsyncLLM, SamplingParams
from turbolm.config import EngineConfig, format_size
from turbolm.errors import TurbolmError
from turbolm.types import Output


async def answer(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> Output:
    return Output.collect([output async for output in llm.generate(prompt, params)])


async def fill(llm: AsyncLLM, num_requests: int, answer_tokens: int) -> dict[str, object]:
    length = llm.config.max_context - answer_tokens
    params = SamplingParams(max_tokens=answer_tokens, temperature=1.0, ignore_eos=True)
    vocabulary = llm.tokenizer.vocab_size
    prompts = [[(17 * i + 31 * j) % (vocabulary - 300) + 10 for j in range(length)] for i in range(num_requests)]
    start = time.perf_counter()
    results = await asyncio.gather(*(answer(llm, prompt, params) for prompt in prompts))
    failed = [result.error for result in results if result.error is not None]
    short = sum(len(result.token_ids) != answer_tokens for result in results)
    await llm.wait_until_warm()
    stats = llm.stats
    return {
        "requests": num_requests,
        "prompt_tokens": length,
        "answer_tokens": answer_tokens,
        "pool_tokens": llm.config.pool_tokens,
        "seconds": time.perf_counter() - start,
        "failed": [str(error) for error in failed[:3]],
        "short_answers": short,
        "preemptions": stats.num_preemptions,
        "used_blocks_after": stats.num_used_blocks,
        "peak_bytes": torch.cuda.max_memory_reserved(),
        "total_bytes": torch.cuda.get_device_properties(0).total_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--answer", type=int, default=200)
    parser.add_argument("--json", type=Path)
    add_engine_options(parser)
    options = parser.parse_args()
    record = start_record("gpu_pool", options)
    config = EngineConfig.of(engine_options(options), max_context=options.max_context, prefix_cache=False)

    async def run() -> dict[str, object]:
        async with AsyncLLM(options.model, config, progress=False) as llm:
            return await fill(llm, options.requests, options.answer)

    try:
        record |= asyncio.run(run())
    except TurbolmError as error:
        exit_with(error)
    write(record, options.json)
    print(
        f"{record['requests']} requests of {record['prompt_tokens']} + {record['answer_tokens']} tokens over a pool of "
        f"{record['pool_tokens']}: {record['seconds']:.1f} s, {record['preemptions']} preemptions, "
        f"{len(record['failed'])} failed, {record['short_answers']} short; at most "
        f"{format_size(record['peak_bytes'])} of {format_size(record['total_bytes'])}"
    )
    if record["failed"] or record["short_answers"] or record["used_blocks_after"]:
        raise SystemExit("requests failed, or blocks were not given back")


if __name__ == "__main__":
    main()
