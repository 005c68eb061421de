"""A model on a smaller card: what fits, how fast it is, and whether the planner foretold it.

python benchmarks/gpu_models.py internlm2-20b --out /dev/shm/internlm2-20b
python benchmarks/gpu_card.py /dev/shm/internlm2-20b --card 24GB --weights int4 --kv int8 --context 4096 [--json FILE]

Another process takes the GPU's memory but for what such a card has, before the engine looks: it finds 24 GB, and an
allocation beyond them fails. The engine then plans for itself; as many sequences of --context tokens as it has room for
run at once, and one alone. The room must be within 5% of what `turbolm plan --gpu 24GB` says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_record import exit_with, start_record, write

from turbolm import AsyncLLM, SamplingParams
from turbolm.config import EngineConfig
from turbolm.errors import TurbolmError
from turbolm.ops.hardware import probe
from turbolm.planner.gpus import found_gpus, parse_machine
from turbolm.planner.model import open_model
from turbolm.planner.plan import Demand, Fit, Rung, plan

ANSWER = 128  # tokens
_BALLAST = """
import sys, torch
free = torch.cuda.mem_get_info(0)[0]
held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info(0)[0], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def smaller_card(num_bytes: int) -> Iterator[int]:
    """Leaves that much of the GPU's memory free; gives what is."""
    command = [sys.executable, "-c", _BALLAST, str(num_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def foretold(options: argparse.Namespace) -> Fit:
    machine = replace(parse_machine(options.card), rates=found_gpus(probe().gpus).rates)  # as fast as this one
    fits = plan(open_model(options.model), machine, Demand(options.context)).fits
    return next(fit for fit in fits if fit.rung == Rung(options.weights, options.kv))


async def measure(options: argparse.Namespace, fit: Fit) -> dict[str, Any]:
    config = EngineConfig(
        device="cuda", weights=options.weights, kv=options.kv, max_context=options.context, prefix_cache=False,
        speculation="off",
    )  # fmt: skip
    start = time.perf_counter()
    async with AsyncLLM(options.model, config, progress=False) as llm:
        loaded = time.perf_counter() - start
        await llm.wait_until_warm()
        resolved = llm.config
        concurrency = min(resolved.pool_tokens // options.context, resolved.max_batch_size)
        most = torch.cuda.memory_reserved()
        figures = {count: await decode(llm, options.context, count) for count in (1, concurrency)}
        return {
            "load_seconds": loaded,
            "kv_tokens": resolved.pool_tokens,
            "kv_tokens_planned": fit.kv_tokens,
            "concurrency": concurrency,
            "concurrency_planned": fit.concurrency,
            "reserved_bytes": max(most, torch.cuda.max_memory_reserved()),
            "tokens_per_second": figures[1],
            "tokens_per_second_planned": fit.tokens_per_second,
            "tokens_per_second_full": figures[concurrency],
            "tokens_per_second_full_planned": fit.tokens_per_second_full,
        }


async def decode(llm: AsyncLLM, context: int, count: int) -> float:
    """Tokens per second of `count` answers, their contexts full at the end, without their prompts' time."""
    seconds = []
    for tokens in (8, 1, ANSWER):  # the first, to compile
        params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)

        async def answer(number: int, params: SamplingParams = params) -> None:
            prompt = [(7 * number + i) % 250 for i in range(context - ANSWER)]
            async for output in llm.generate(prompt, params):
                if output.error is not None:
                    raise output.error

        start = time.perf_counter()
        await asyncio.gather(*(answer(number) for number in range(count)))
        seconds.append(time.perf_counter() - start)
    return count * (ANSWER - 1) / (seconds[2] - seconds[1])


def describe(row: dict[str, Any]) -> str:
    return (
        f"room for {row['kv_tokens']:,} tokens, planned {row['kv_tokens_planned']:,} "
        f"({row['kv_tokens'] / row['kv_tokens_planned'] - 1:+.1%}); {row['concurrency']} at once, "
        f"planned {row['concurrency_planned']}; {row['tokens_per_second']:.1f} tok/s alone, "
        f"planned {row['tokens_per_second_planned'] or 0:.1f}; {row['tokens_per_second_full']:.0f} together, "
        f"planned {row['tokens_per_second_full_planned'] or 0:.0f}; loaded in {row['load_seconds']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--card", default="24GB", help="as `turbolm plan --gpu` takes it")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        card = parse_machine(options.card).hardware.gpus[0]
        with smaller_card(card.total_memory) as free:  # before this process has anything on the GPU
            record = start_record("gpu_card", options) | {"free_bytes": free}
            fit = foretold(options)
            record["row"] = asyncio.run(measure(options, fit))
    except TurbolmError as error:
        exit_with(error)
    print(describe(record["row"]))
    write(options.json, record)
    if abs(record["row"]["kv_tokens"] / fit.kv_tokens - 1) > 0.05:
        raise SystemExit("the plan is off")


if __name__ == "__main__":
    main()
