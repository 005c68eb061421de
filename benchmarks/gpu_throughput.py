"""How fast the engine runs the GPU workloads of gpu_workloads.py, beside the hardware's limit and other engines.

python benchmarks/gpu_models.py llama-3-8b --out /dev/shm/llama-3-8b
python benchmarks/gpu_throughput.py /dev/shm/llama-3-8b --workloads w1,w2,w3,w5 --json w.json [--seconds 300]

Prefix cache and speculation are off, answers are sampled from the whole vocabulary (--greedy: not).
Decode: the elapsed time of all answers and of one token each; tok/s counts everything, ms/step is
(difference) / (steps - 1). The best of 2 rounds, as the other engines were measured; first tokens: the
median of 3. What doesn't fit into --seconds is skipped or cut off, and said so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_models import SHAPES
from gpu_record import (
    Clock,
    add_engine_options,
    device_name,
    engine_options,
    exit_with,
    number,
    start_record,
    table,
    write,
)
from gpu_workloads import (
    GROUPS,
    Ask,
    Workload,
    best_peer,
    costs_of,
    is_less_better,
    read_config,
    warm_prefill,
    workloads,
)

from turbolm import AsyncLLM, SamplingParams
from turbolm.delivery import complete
from turbolm.errors import EngineError, TurbolmError

#: What the other engines were given as their longest context; elsewhere the model's own.
CONTEXTS = {"llama-3-8b": 16384, "llama-2-7b-awq": 4096, "qwen3-0.6b": 4096}
#: Bytes per number of the KV cache, where that isn't as wide as activations.
KV_BYTES = {"float32": 4.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
WARM = "warm-up"
FIRST_GUESS = 2.5  # of how many times its floor a run takes, until one has been seen


@dataclass(frozen=True)
class Row:
    """One line of the results; what is None was not measured, and `note` says why."""

    name: str
    unit: str = "-"
    figure: float | None = None
    seconds: float | None = None  # of a step of decode; of everything in other rows
    floor_seconds: float | None = None
    is_step: bool = False
    peer: str | None = None  # the best of the other engines
    peer_figure: float | None = None
    ratio: float | None = None  # over that: above 1 is faster
    must: float | None = None
    note: str = ""

    @property
    def cells(self) -> list[str]:
        scale, unit = (1e3, "ms/step") if self.is_step else (1, "s") if (self.seconds or 0) >= 1 else (1e3, "ms")
        times = [
            None if value is None else f"{number(value * scale)} {unit}" for value in (self.seconds, self.floor_seconds)
        ]
        share = self.floor_seconds / self.seconds if self.seconds and self.floor_seconds else None
        peer = None if self.peer_figure is None else f"{number(self.peer_figure)} {self.peer}"
        ratio, must = (None if value is None else f"{value:.2f}x" for value in (self.ratio, self.must))
        met = None if self.ratio is None or self.must is None else "yes" if self.ratio >= self.must else "NO"
        found = [number(self.figure) if self.figure is not None else None, self.unit, *times]
        found += [None if share is None else f"{share:.0%}", peer, ratio, must, met, self.note]
        return [self.name, *("-" if value is None else value for value in found)]


HEADER = ("workload", "figure", "unit", "took", "floor", "of floor", "best peer", "ratio", "must", "met", "")


class SkippedError(Exception):
    """A measurement that doesn't fit into the time left."""


class Bench:
    """Runs workloads on one engine and counts the time left."""

    def __init__(self, llm: AsyncLLM, model: str, clock: Clock, options: argparse.Namespace) -> None:
        self.llm, self.model, self.clock, self.must = llm, model, clock, options.must
        self.is_greedy, self.is_streaming = options.greedy, options.stream
        kv_dtype = str(llm.config.kv)
        self.costs = costs_of(options.model, KV_BYTES.get(kv_dtype, 2.0))
        self.suffix = f", KV cache {kv_dtype}" if KV_BYTES.get(kv_dtype, 2.0) < 2 else ""
        self.slowness: dict[str, float] = {}
        self.runs: list[dict[str, Any]] = []

    async def seconds(self, name: str, kind: str, asks: Sequence[Ask], temperature: float) -> float:
        """Elapsed from the first request's submission to the last answer's end. Raises SkippedError."""
        least = self.costs.run_seconds(asks)
        expected = least * self.slowness.get(kind, FIRST_GUESS)
        if self.clock.left < max(expected, 0.01):
            raise SkippedError(f"skipped: takes about {expected:.1f} s, {self.clock.left:.1f} s are left")
        params = SamplingParams(temperature=0 if self.is_greedy else temperature, ignore_eos=True)
        own = [replace(params, max_tokens=ask.answer) for ask in asks]
        before, start = self.llm.stats, time.perf_counter()
        try:
            counts = await asyncio.wait_for(self._answer(asks, own), self.clock.left)
        except asyncio.TimeoutError:
            raise SkippedError("cut off: the time was up") from None
        elapsed = time.perf_counter() - start
        if counts != [ask.answer for ask in asks]:
            raise EngineError(f"{name}: {sum(counts)} tokens came back, {sum(ask.answer for ask in asks)} were asked")
        after = self.llm.stats
        if kind != WARM:  # that compiles kernels, and says nothing about later runs
            self.slowness[kind] = elapsed / least
        self.runs.append({
            "name": name, "seconds": elapsed, "requests": len(asks), "prompt_tokens": sum(len(a.prompt) for a in asks),
            "answer_tokens": sum(counts), "steps": after.num_steps - before.num_steps,
            "preemptions": after.num_preemptions - before.num_preemptions,
        })  # fmt: skip
        return elapsed

    async def _answer(self, asks: Sequence[Ask], params: Sequence[SamplingParams]) -> list[int]:
        """Tokens that came back. As LLM.generate does it; there, and without --stream here, an answer comes as a whole,
        and no text is made per token."""
        asked = [
            self.llm._submit(self.llm._plain(ask.prompt), own, deltas=self.is_streaming)
            for ask, own in zip(asks, params, strict=True)
        ]
        outputs = [completion.outputs[0] for completion in await complete(asked, lambda _: None)]
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [len(output.token_ids) for output in outputs]

    async def warm(self) -> None:
        """What goes before everything. Where there is no time for it, nor is there for the rest, which says so."""
        asks = [Ask([10 + i] * 64, 16) for i in range(4)]
        with contextlib.suppress(SkippedError):
            await self.seconds("warm-up", WARM, asks, temperature=1.0)

    async def rows(self, work: Workload, vocab_size: int) -> list[Row]:
        """The rows that a workload yields."""
        measure = {
            "decode": self._decode, "long decode": self._long_decode, "run": self._run, "prefill": self._prefill,
            "first token": self._first_token,
        }[work.kind]  # fmt: skip
        if work.kind == "prefill":
            await self.seconds(f"{work.name}, warm-up", WARM, warm_prefill(vocab_size), work.temperature)
        elif work.kind == "run" and work.temperature < 1:
            await self.seconds(f"{work.name}, warm-up", WARM, work.shortened(16), work.temperature)
        return await measure(work)

    async def _rounds(self, name: str, work: Workload, asks: Sequence[Ask], rounds: int) -> list[float]:
        """The seconds of up to so many rounds: at least one, or SkippedError."""
        kind = f"{work.kind}, 1 token" if asks[0].answer == 1 else work.kind
        found = [await self.seconds(name, kind, asks, work.temperature)]
        for _ in range(rounds - 1):
            try:
                found.append(await self.seconds(name, kind, asks, work.temperature))
            except SkippedError:
                break
        return found

    async def _decode(self, work: Workload) -> list[Row]:
        num_tokens, streams = work.asks[0].answer, len(work.asks)
        await self.seconds(f"{work.name}, warm-up", WARM, work.shortened(9), work.temperature)
        first = min(await self._rounds(f"{work.name}, 1 token", work, work.shortened(1), work.rounds))
        whole = min(await self._rounds(work.name, work, work.asks, work.rounds))
        step, floor = (whole - first) / (num_tokens - 1), self.costs.floor_seconds(work)
        net = f"{number(streams / step)} tok/s without the first"
        return [self._row(work.name, "tok/s", streams * num_tokens / whole, step, floor, is_step=True, note=net)]

    async def _long_decode(self, work: Workload) -> list[Row]:
        num_tokens = work.asks[0].answer
        await self.seconds(f"{work.name}, warm-up", WARM, work.shortened(2)[:8], work.temperature)
        first = min(await self._rounds(f"{work.name}, 1 token", work, work.shortened(1), 1))
        least = self.costs.prefill_seconds([len(ask.prompt) for ask in work.asks])
        prefill = self._row(f"{work.name} prefill", "s", first, first, least)
        try:
            whole = min(await self._rounds(work.name, work, work.asks, work.rounds))
        except SkippedError as reason:
            return [prefill, Row(f"{work.name} decode", note=str(reason))]
        step, floor = (whole - first) / (num_tokens - 1), self.costs.floor_seconds(work)
        return [prefill, self._row(f"{work.name} decode", "ms/step", step * 1e3, step, floor, is_step=True)]

    async def _run(self, work: Workload) -> list[Row]:
        whole = min(await self._rounds(work.name, work, work.asks, work.rounds))
        # As each benchmark is published: ShareGPT's in requests, nano-vllm's in tokens per second.
        unit, count = ("req/s", len(work.asks)) if work.name == "W2" else ("tok/s", work.num_answer_tokens)
        note = f"{number(work.num_answer_tokens / whole)} tok/s out"
        return [self._row(work.name, unit, count / whole, whole, self.costs.floor_seconds(work), note=note)]

    async def _prefill(self, work: Workload) -> list[Row]:
        whole = min(await self._rounds(work.name, work, work.asks, work.rounds))
        return [self._row(work.name, "tok/s", work.num_prompt_tokens / whole, whole, self.costs.floor_seconds(work))]

    async def _first_token(self, work: Workload) -> list[Row]:
        middle = statistics.median(await self._rounds(work.name, work, work.asks, work.rounds))
        return [self._row(work.name, "ms", middle * 1e3, middle, self.costs.floor_seconds(work))]

    def _row(
        self,
        name: str,
        unit: str,
        figure: float,
        seconds: float,
        floor_seconds: float,
        *,
        is_step: bool = False,
        note: str = "",
    ) -> Row:
        name += self.suffix
        row = Row(name, unit, figure, seconds, floor_seconds, is_step, note=note)
        peer = best_peer(self.model, name)
        if peer is None:
            return row
        ratio = peer.figure / figure if is_less_better(unit) else figure / peer.figure
        return replace(row, peer=peer.engine, peer_figure=peer.figure, ratio=ratio, must=self.must)


def shape_name(config: dict[str, Any]) -> str:
    """Which of gpu_models.SHAPES a config.json is; "" for others."""
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    for name, shape in SHAPES.items():
        is_awq = "quantization_config" in config
        if shape.awq == is_awq and all(shape.config[key] == config.get(key) for key in names):
            return name
    return ""


async def measure_all(options: argparse.Namespace, record: dict[str, Any]) -> list[Row]:
    """Loads the engine and runs every workload; `record` is written after each."""
    config = read_config(options.model)
    model, vocab_size = shape_name(config), config["vocab_size"]
    settings = engine_options(
        options, prefix_cache=False, speculation="off", max_context=CONTEXTS.get(model, 0), dtype=options.dtype,
        deterministic=options.deterministic,
    )  # fmt: skip
    start = time.perf_counter()
    rows: list[Row] = []
    async with AsyncLLM(str(options.model), progress=False, **settings) as llm:
        bench = Bench(llm, model, Clock(options.seconds), options)
        record |= {"model": model or options.model.name, "load_seconds": time.perf_counter() - start}
        await llm.wait_until_warm()
        record |= {"warm_seconds": time.perf_counter() - start}
        record |= {"config": asdict(llm.config), "costs": asdict(bench.costs), "runs": bench.runs}
        print(
            f"{record['model']} on {device_name(record['machine'])}, loaded in "
            f"{record['load_seconds']:.1f} s, warm after {record['warm_seconds']:.1f} s"
        )
        print("\n".join(f"  {reason}" for reason in llm.config.reasons), flush=True)
        await bench.warm()
        for group in options.workloads:
            for work in workloads(group, vocab_size):
                if options.only and not any(text in work.name for text in options.only):
                    continue
                rows += await _measured(bench, work, vocab_size)
                record["rows"] = [asdict(row) for row in rows]
                write(options.json, record)
                print(f"  {' '.join(rows[-1].cells[:4])} {rows[-1].note}", flush=True)
    return rows


async def _measured(bench: Bench, work: Workload, vocab_size: int) -> list[Row]:
    """A workload's rows, or one that says why there is none: a failure doesn't end the others."""
    try:
        return await bench.rows(work, vocab_size)
    except SkippedError as reason:
        return [Row(work.name, note=str(reason))]
    except TurbolmError as error:
        return [Row(work.name, note=f"failed: {str(error)[:200]}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder made by gpu_models.py, or any with safetensors")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=list(GROUPS[:3]), metavar="W1,W2")
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows whose name has this, e.g. 'batch 64'")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of drawing")
    parser.add_argument("--stream", action="store_true", help="take every token as it comes")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--deterministic", action="store_true", help="kernels whose bits don't depend on the batch")
    parser.add_argument("--seconds", type=float, default=600, help="time budget, after loading")
    parser.add_argument("--must", type=float, default=1.0, help="the ratio to the best peer that counts as met")
    parser.add_argument("--json", type=Path, help="write the results here")
    add_engine_options(parser)
    options = parser.parse_args()
    record = start_record("gpu_throughput", options)
    try:
        rows = asyncio.run(measure_all(options, record))
    except TurbolmError as error:
        exit_with(error)
    print(table(HEADER, [row.cells for row in rows]))


if __name__ == "__main__":
    main()
