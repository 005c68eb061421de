"""What `turbolm plan` foretells beside the GPU memory that the engine takes, rung by rung.

python benchmarks/gpu_memory.py MODEL [--rungs auto/auto,int8/int8,int4/int8,int4/int4] [--json FILE]

MODEL: a folder of gpu_models.py, for example llama-3-8b. Each rung (weights/KV) runs in a process of its own with a
KV cache of 8 GiB, computes prompts of 8192 tokens and 64 answers at once, and ends with its figures. Weights must be
within 5% of the plan, weights, KV cache and working memory together within what is planned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_record import start_record, write

from turbolm import AsyncLLM, SamplingParams
from turbolm.config import EngineConfig
from turbolm.ops.hardware import probe
from turbolm.planner.gpus import found_gpus
from turbolm.planner.model import open_model
from turbolm.planner.plan import Demand, Rung, plan

RUNGS = "auto/auto,int8/int8,int4/int8,int4/int4"


async def measure(folder: str, rung: Rung) -> dict[str, Any]:
    model, machine = open_model(folder), found_gpus(probe().gpus)
    fit = next(fit for fit in plan(model, machine, Demand(4096)).fits if fit.rung == rung)
    torch.cuda.init()
    free = torch.cuda.mem_get_info(0)[0]
    config = EngineConfig(device="cuda", weights=rung.weights, kv=rung.kv, kv_memory="8G", prefix_cache=False)
    async with AsyncLLM(folder, config, progress=False) as llm:
        resolved = llm.config
        pool = resolved.pool_tokens * resolved.kv_bytes_per_token
        loaded = torch.cuda.memory_allocated() - pool - fit.working.logits
        await llm.wait_until_warm()
        length = min(8192, resolved.max_context - 32)
        params = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)

        async def answer(number: int, tokens: int) -> None:
            async for output in llm.generate([(7 * number + i) % 250 for i in range(tokens)], params):
                if output.error is not None:
                    raise output.error

        for tokens, count in ((length, 4), (64, 64)):
            await asyncio.gather(*(answer(number, tokens) for number in range(count)))
        taken = free - torch.cuda.mem_get_info(0)[0]
        return {
            "weights": rung.weights,
            "kv": rung.kv,
            "weight_bytes": loaded,
            "weight_bytes_planned": fit.weight_bytes,
            "kv_bytes_per_token": resolved.kv_bytes_per_token,
            "kv_bytes_per_token_planned": fit.kv_bytes_per_token,
            "total_bytes": taken,
            "total_bytes_planned": fit.needed_bytes + pool,
        }


def is_right(row: dict[str, Any]) -> bool:
    weights = abs(row["weight_bytes"] / row["weight_bytes_planned"] - 1) <= 0.05
    return weights and row["total_bytes"] <= row["total_bytes_planned"]


def describe(row: dict[str, Any]) -> str:
    weights, weights_planned, total, total_planned = (
        row[name] / 1e9 for name in ("weight_bytes", "weight_bytes_planned", "total_bytes", "total_bytes_planned")
    )
    return (
        f"{row['weights']}/{row['kv']}: weights {weights:.2f} GB, planned {weights_planned:.2f}; all {total:.2f} GB, "
        f"planned {total_planned:.2f} ({total / total_planned - 1:+.1%}); {'ok' if is_right(row) else 'WRONG'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--rungs", default=RUNGS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(asyncio.run(measure(options.model, Rung(*options.part.split("/"))))))
        return
    record = start_record("gpu_memory", options)
    record["rows"] = []
    for rung in options.rungs.split(","):
        command = [sys.executable, __file__, options.model, "--part", rung]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        row = json.loads(done.stdout.splitlines()[-1])
        record["rows"].append(row)
        print(describe(row), flush=True)
    write(options.json, record)
    if not all(map(is_right, record["rows"])):
        raise SystemExit("the plan is off")


if __name__ == "__main__":
    main()
