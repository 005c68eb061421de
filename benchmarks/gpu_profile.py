"""Where a decode step's time goes: on the GPU by kernel, and in the engine's thread by call.

python benchmarks/gpu_profile.py MODEL [--streams 64] [--context 256] [--steps 20] [--json FILE] [--trace FILE]

Two passes over steady decoding. The first, without a profiler, times what the engine's thread calls in each
step. The second records kernels: time per step and kernel, launches per layer, and the gaps between
kernels in which the GPU did nothing (negative where they overlap).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_record import add_engine_options, device_name, engine_options, exit_with, number, start_record, table, write
from torch.autograd import DeviceType

from turbolm.config import EngineConfig
from turbolm.engine.engine import Engine
from turbolm.errors import TurbolmError
from turbolm.loading import LoadedModel, load_model
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.types import Output, Request, SamplingParams

TIMED = ("next_batch", "submit", "results", "update", "deliver")
WARM_STEPS = 8
LONGEST_WAIT = 120  # seconds


class Timed:
    """Stands in for an object, noting when calls of its methods named in TIMED began and how long they took."""

    def __init__(self, target: Any, calls: list[tuple[str, float, float]]) -> None:
        self._target = target
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return timed(name, value, self._calls) if name in TIMED else value


def timed(name: str, function: Callable[..., Any], calls: list[tuple[str, float, float]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        calls.append((name, start, time.perf_counter() - start))
        # A submitted step is waited for later, by its `results`.
        return Timed(result, calls) if name == "submit" else result

    return call


class Decoding:
    """The engine with `streams` requests that go on for longer than anyone watches."""

    def __init__(self, model: LoadedModel, streams: int, context: int, num_tokens: int, temperature: float) -> None:
        self.calls: list[tuple[str, float, float]] = []
        self._changed = threading.Condition()
        self._num_deliveries = 0
        self._num_started = 0
        self._error: TurbolmError | None = None
        self._streams = streams
        deliver = timed("deliver", self._deliver, self.calls)
        self._engine = Engine(Timed(model.scheduler, self.calls), Timed(model.runner, self.calls), deliver)  # type: ignore[arg-type]
        self._engine.wait_until_warm()
        rng = np.random.default_rng([streams, context])
        params = SamplingParams(max_tokens=num_tokens, temperature=temperature, ignore_eos=True)
        prompts = rng.integers(0, model.text.vocab_size, (streams, context)).tolist()
        self._engine.submit([Request(str(i), tuple(prompt), params) for i, prompt in enumerate(prompts)])

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def _deliver(self, outputs: Sequence[Output]) -> None:
        with self._changed:
            self._num_deliveries += 1
            for output in outputs:
                self._error = self._error or output.error
            self._num_started = max(self._num_started, len(outputs))
            self._changed.notify_all()

    def wait_steps(self, count: int) -> None:
        """Until so many steps have come in which every stream took part."""
        with self._changed:
            self._wait(lambda: self._num_started == self._streams)
            last = self._num_deliveries + count
            self._wait(lambda: self._num_deliveries >= last)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        """With `_changed` held."""
        if not self._changed.wait_for(lambda: self._error is not None or is_there(), LONGEST_WAIT):
            raise SystemExit(f"steady decoding of {self._streams} streams wasn't reached in {LONGEST_WAIT} s")
        if self._error is not None:
            raise self._error


def engine_table(calls: Sequence[tuple[str, float, float]], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds per call in the last steps, by name; "step" is from one delivery to the next, and "other"
    what no named call took of it."""
    ends = [start + length for name, start, length in calls if name == "deliver"][-steps - 1 :]
    within = [call for call in calls if ends[0] <= call[1] < ends[-1]]
    found = {}
    for name in TIMED:
        lengths = [length * 1e3 for called, _, length in within if called == name]
        if lengths:
            share = sum(lengths) / (len(ends) - 1)
            found[name] = {"median": statistics.median(lengths), "max": max(lengths), "per_step": share}
    gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(ends)]
    whole = sum(gaps) / len(gaps)
    found["step"] = {"median": statistics.median(gaps), "max": max(gaps), "per_step": whole}
    other = whole - sum(entry["per_step"] for name, entry in found.items() if name != "step")
    found["other"] = {"median": other, "max": other, "per_step": other}
    return found


@dataclass(frozen=True)
class Kernel:
    name: str
    start: float  # microseconds
    length: float


def kernels_of(profiler: torch.profiler.profile) -> list[Kernel]:
    """What ran on the GPU, in order; on a machine without one, torch's own ops on the CPU."""
    events = [event for event in profiler.events() if event.device_type != DeviceType.CPU]
    events = events or list(profiler.events())
    found = [Kernel(e.name, e.time_range.start, e.time_range.end - e.time_range.start) for e in events]
    return sorted(found, key=lambda kernel: kernel.start)


def kernel_table(kernels: Sequence[Kernel], steps: float) -> list[dict[str, Any]]:
    """By name, longest first: microseconds per step, calls per step, median microseconds of a call."""
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.length)
    rows = [
        {"name": name, "us_per_step": sum(times) / steps, "calls": len(times) / steps, "us": statistics.median(times)}
        for name, times in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_step"])


def gaps_of(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Microseconds between the end of everything before and the start of each kernel; busy and whole time."""
    gaps, end, busy = [], kernels[0].start, 0.0
    for kernel in kernels:
        gaps.append(kernel.start - end)
        new_end = max(end, kernel.start + kernel.length)
        busy += new_end - max(end, kernel.start)
        end = new_end
    whole = end - kernels[0].start
    cuts = statistics.quantiles(gaps[1:], n=20) if len(gaps) > 3 else [0.0] * 19
    return {
        "median": statistics.median(gaps), "95th percentile": cuts[18], "largest": max(gaps),
        "sum of gaps": sum(gap for gap in gaps if gap > 0), "busy": busy, "whole": whole,
    }  # fmt: skip


def profile_kernels(decoding: Decoding, steps: int, trace: Path | None) -> tuple[list[Kernel], float]:
    """Kernels of about `steps` steps, and how many steps there were."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    before = len(decoding.calls)
    with torch.profiler.profile(activities=[activity]) as profiler:
        decoding.wait_steps(steps)
        if on_gpu:
            torch.cuda.synchronize()
    num_steps = sum(name == "update" for name, _, _ in decoding.calls[before:])
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return kernels_of(profiler), float(max(num_steps, 1))


def report(record: dict[str, Any], top: int) -> None:
    engine, gaps, kernels = record["engine_ms"], record["gaps_us"], record["kernels"]
    rows = [
        [name, *(f"{entry[key]:.3f}" for key in ("per_step", "median", "max")), ""] for name, entry in engine.items()
    ]
    print(table(("engine's thread, ms", "per step", "median call", "longest", ""), rows))
    if not kernels:
        print("no kernels were recorded")
        return
    whole = sum(row["us_per_step"] for row in kernels)
    calls = sum(row["calls"] for row in kernels)
    print(
        f"\n{calls:.1f} launches per step, {calls / record['layers']:.1f} per layer; {whole:.0f} us of kernels per step"
    )
    shown = [
        [f"{row['us_per_step']:.1f}", f"{row['us_per_step'] / whole:.1%}", f"{row['calls']:.1f}", f"{row['us']:.2f}"]
        for row in kernels[:top]
    ]
    names = [row["name"][:80] for row in kernels[:top]]
    cells = [["", *row, name] for row, name in zip(shown, names, strict=True)]
    print(table(("", "us/step", "share", "calls/step", "us/call", "kernel"), cells))
    print("gaps between kernels, us: " + ", ".join(f"{name} {number(value)}" for name, value in gaps.items()))


def measure(options: argparse.Namespace, record: dict[str, Any]) -> None:
    num_tokens = 2 * (options.steps + WARM_STEPS) + options.streams + 4096
    settings = engine_options(options, prefix_cache=False, speculation="off")
    spec = decoder_spec(open_checkpoint(Path(options.model)).config)
    num_tokens = min(num_tokens, spec.max_context - options.context)
    model = load_model(options.model, EngineConfig.of(None, **settings), progress=False)
    if options.streams > model.config.max_batch_size:
        raise SystemExit(
            f"--streams is {options.streams}; this engine computes at most {model.config.max_batch_size} together "
            "(-o max_batch_size=N changes that)"
        )
    record |= {"layers": len(spec.layers), "reasons": model.config.reasons}
    with Decoding(model, options.streams, options.context, num_tokens, options.temperature) as decoding:
        decoding.wait_steps(WARM_STEPS + options.steps)
        record["engine_ms"] = engine_table(list(decoding.calls), options.steps)
        kernels, steps = profile_kernels(decoding, options.steps, options.trace)
    record["kernels"] = kernel_table(kernels, steps)
    record["gaps_us"] = gaps_of(kernels) if kernels else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--context", type=int, default=256, help="tokens in each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top", type=int, default=25, help="kernels to print")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="also write a trace for chrome://tracing or Perfetto")
    add_engine_options(parser)
    options = parser.parse_args()
    record = start_record("gpu_profile", options)
    try:
        measure(options, record)
    except TurbolmError as error:
        exit_with(error)
    print(f"{options.model} on {device_name(record['machine'])}: {options.streams} streams, context {options.context}")
    report(record, options.top)
    write(options.json, record)


if __name__ == "__main__":
    main()
