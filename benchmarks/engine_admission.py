"""What the host spends on requests that arrive at once: from the call to the scheduler's queue, per step while others
wait, and per result.

    python benchmarks/engine_admission.py [--rounds 9] [--save engine_admission]

No model: a device that answers with the same token takes a set time per step. Launching a step lets go of Python's
lock 400 times, as kernels' launches do, so that a busy caller delays it here as it does on a GPU. All parts share one
process and its lock, as they do in `LLM`. Each figure is the least of the rounds, since other work only adds to it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from measure import machine, save

from turbolm import LLM, SamplingParams, loading
from turbolm.config import ResolvedConfig
from turbolm.engine import build
from turbolm.engine.batch import StepArrays
from turbolm.engine.build import EngineParts
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import StepResult
from turbolm.engine.step_device import StepDevice
from turbolm.types import Request

LAUNCHES = 400  # of a step's kernels
STEP_SECONDS, TOKEN_SECONDS = 2e-3, 2.5e-6  # of the device
MAX_TOKENS, MAX_BATCH, MAX_CONTEXT, BLOCK = 8192, 1024, 4096, 16
OPTIONS: dict[str, Any] = {
    "max_batch_size": MAX_BATCH, "max_batch_tokens": MAX_TOKENS + MAX_BATCH, "max_context": MAX_CONTEXT,
    "block_size": BLOCK, "kv_memory": "4M", "speculation": "off",
}  # fmt: skip


class Device(StepDevice):
    """Without a model."""

    def __init__(self) -> None:
        unused: Any = None
        super().__init__(unused, None, torch.device("cpu"), unused, unused)
        self.launches: list[tuple[float, float, int, bool]] = []  # from, until, tokens, with prompts
        self.results_at = 0.0
        self.ready_at = 0.0
        self.idle_seconds = 0.0

    def compute(self, arrays: StepArrays, *_: Any, **_named: Any) -> Any:
        start = time.perf_counter()
        is_long = arrays.max_query > 1
        for _number in range(LAUNCHES if is_long else 5):  # decodes are one graph
            time.sleep(0)
        now = time.perf_counter()
        if self.launches:
            self.idle_seconds += max(0.0, now - self.ready_at)
        self.launches.append((start, now, len(arrays.token_ids), is_long))
        self.ready_at = max(now, self.ready_at) + STEP_SECONDS + TOKEN_SECONDS * len(arrays.token_ids)
        return Flight(self, len(arrays.logit_rows), self.ready_at)


@dataclass
class Flight:
    """A step on its way; `Computed` and `Download` in one."""

    device: Device
    count: int
    ready_at: float
    sums: None = None

    def download(self) -> Flight:
        return self

    def wait(self, _check: object = None) -> list[int]:
        time.sleep(max(0.0, self.ready_at - time.perf_counter()))
        self.device.results_at = time.perf_counter()
        return [100] * self.count


@dataclass(frozen=True)
class Run:
    """Figures of one call of `LLM.generate`."""

    admitted_us: float  # per request, until all are in the scheduler's queue
    first_step_ms: float  # from the call until the first step's launch begins
    first_step_tokens: int
    late_ms: float  # how much longer the launches of the first 4 steps took than 4 times the shortest one's
    result_us: float  # per request, from the last step's results to the end of the call
    idle_ms: float  # of the device between steps
    seconds: float


def run(llm: LLM, device: Device, prompts: Sequence[list[int]], answer: int) -> Run:
    engine: Any = llm._llm._engine
    scheduler: Scheduler = engine._scheduler
    device.launches.clear()
    device.idle_seconds = 0.0
    admitted: list[float] = []
    add: Callable[..., Any] = scheduler.add

    def noted(*arguments: Any) -> Any:
        found = add(*arguments)
        admitted.append(time.perf_counter())
        return found

    params = [SamplingParams(max_tokens=answer, ignore_eos=True) for _ in prompts]
    with mock.patch.object(scheduler, "add", noted):
        start = time.perf_counter()
        completions = llm.generate(prompts, params)
        end = time.perf_counter()
    assert all(len(completion.outputs[0].token_ids) == answer for completion in completions)
    launches = [until - begun for begun, until, _, has_prompts in device.launches if has_prompts]
    return Run(
        admitted_us=(admitted[-1] - start) / len(prompts) * 1e6,
        first_step_ms=(device.launches[0][0] - start) * 1e3,
        first_step_tokens=device.launches[0][2],
        late_ms=(sum(launches[:4]) - len(launches[:4]) * min(launches)) * 1e3,
        result_us=(end - device.results_at) / len(prompts) * 1e6,
        idle_ms=device.idle_seconds * 1e3,
        seconds=end - start,
    )


def step_us(num_waiting: int, num_running: int = 256, steps: int = 200) -> float:
    """Microseconds of the scheduler per step of decodes, while so many requests wait for a place."""
    scheduler = Scheduler(40_000, BLOCK, num_running, MAX_TOKENS, MAX_CONTEXT, 10_000)
    params = SamplingParams(max_tokens=3000, ignore_eos=True)
    for number in range(num_running + num_waiting):
        scheduler.add(Request(str(number), tuple(range(30)), params))
    times = []
    while len(times) < steps:
        start = time.perf_counter()
        step = scheduler.next_batch()
        assert step is not None
        results = [StepResult((7,) if item.samples else ()) for item in step.items]
        scheduler.update(step, results)
        if step.num_tokens == len(step.items):
            times.append(time.perf_counter() - start)
    return min(times) * 1e6


def loaded(prefix_cache: bool) -> tuple[LLM, Device]:
    device = Device()

    def parts(config: ResolvedConfig) -> EngineParts:
        runner: Any = DeviceRunner(device, config, config.block_size, 258)
        return EngineParts(build._scheduler(config), runner)

    with mock.patch.object(loading, "build_null", parts):
        return LLM("null", progress=False, prefix_cache=prefix_cache, **OPTIONS), device


def best_of(runs: Sequence[Run]) -> dict[str, float]:
    return {name: min(getattr(run, name) for run in runs) for name in vars(runs[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write the figures to results/NAME.json")
    options = parser.parse_args()
    random.seed(0)
    record: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "calls": {}}
    for has_cache in (False, True):
        llm, device = loaded(has_cache)
        with llm:
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
            for count, length, answer in ((1000, 220, 12), (256, 560, 12), (1000, 8, 2)):
                runs = []
                for _ in range(options.rounds):
                    prompts = [random.choices(range(256), k=length) for _ in range(count)]
                    runs.append(run(llm, device, prompts, answer))
                name = f"{count} of {length} tokens{', prefix cache' * has_cache}"
                figures = record["calls"][name] = best_of(runs)
                print(f"{name}: " + ", ".join(f"{key} {value:,.1f}" for key, value in figures.items()), flush=True)
    record["step_us"] = {str(waiting): step_us(waiting) for waiting in (0, 744)}
    print(f"scheduler, a step of 256 decodes: {record['step_us']['0']:.0f} us; with 744 waiting: ", end="")
    print(f"{record['step_us']['744']:.0f} us")
    if options.save:
        print(f"written to {save(options.save, record)}")


if __name__ == "__main__":
    main()
