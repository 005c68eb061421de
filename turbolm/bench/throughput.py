"""`turbolm bench throughput`: tokens per second of a model on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from turbolm.bench.record import check_writable, machine, write_record
from turbolm.bench.workload import Workload, decode, prefill, run, summary
from turbolm.config import DEFAULT_MODEL, Device, DType, EngineConfig, Kernels, ResolvedConfig, Speculation
from turbolm.errors import CapacityError, ConfigError
from turbolm.llm import LLM

_MAX_TOKENS = 1 << 20


def throughput(
    model: str = DEFAULT_MODEL,
    /,
    *,
    streams: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative_iterable=())] = (1, 2, 4, 8, 16, 32),
    prompt: int = 512,
    context: int = 32,
    answer: int = 96,
    rounds: int = 3,
    threads: int = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    kernels: Kernels = "auto",
    speculation: Speculation = "off",
    output: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Time a model: prefill of one prompt, then decode of 1, 2, 4 … streams at once.

    Prompts are random tokens, fresh in each round, and answers are greedy and run on past end-of-text. Decode counts
    from when every stream has its first token. One round goes before those that count.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name or pypi:package.
    streams
        Numbers of streams to decode at once, as in --streams 1 8 32.
    prompt
        Tokens of the prompt whose prefill is timed; 0: leave prefill out.
    context
        Tokens of each prompt before decoding.
    answer
        Tokens that each stream decodes.
    rounds
        How often everything is timed; the table shows medians.
    threads
        CPU threads; 0: one per physical core that this process may use.
    device
        Where the model runs.
    dtype
        As in turbolm chat: "auto" keeps packed weights packed.
    kernels
        "reference" runs plain PyTorch.
    speculation
        "auto" switches it on; random prompts make answers repeat, which flatters it.
    output
        Write all figures to this JSON file.
    """
    _check("--streams", streams, 4096)
    _check("--prompt", (prompt,), _MAX_TOKENS, low=0)
    for name, value in (("--context", context), ("--rounds", rounds)):
        _check(name, (value,), _MAX_TOKENS)
    _check("--answer", (answer,), _MAX_TOKENS, low=2)
    check_writable(output)
    works = [*([prefill(prompt)] if prompt else []), *(decode(count, context, answer) for count in streams)]
    config = EngineConfig(
        device=device,
        dtype=dtype,
        kernels=kernels,
        threads=threads,
        max_batch_size=max(streams) if max(streams) > 32 else 0,
        speculation=speculation,
    )
    with LLM(model, config) as llm:
        _check_room(works, llm.config)
        with Console(stderr=True).status("warming up") as status:
            figures = measure(llm, works, rounds, status.update)
        resolved = llm.config
    _print(model, resolved, figures)
    if output is not None:
        record = {"benchmark": "throughput", "model": model, "machine": machine(), "config": asdict(resolved)}
        rows = {name: summary(values) for name, values in figures.items()}
        write_record(output, {**record, "tokens_per_second": rows})


def measure(llm: LLM, works: Sequence[Workload], rounds: int, say: Callable[[str], object]) -> dict[str, list[float]]:
    """Tokens per second by the workloads' names, one figure a round, after a round that doesn't count."""
    figures: dict[str, list[float]] = {work.name: [] for work in works}
    for round_ in range(rounds + 1):
        for work in works:
            say(f"{work.name}, round {round_} of {rounds}" if round_ else f"warming up: {work.name}")
            value = run(llm, work, round_)
            if round_:
                figures[work.name].append(value)
    return figures


def _check(name: str, values: Sequence[int], high: int, low: int = 1) -> None:
    if not values or not all(low <= value <= high for value in values):
        raise ConfigError(f"{name} must be from {low} to {high}, got {' '.join(map(str, values)) or 'nothing'}")


def _check_room(works: Sequence[Workload], config: ResolvedConfig) -> None:
    """Streams that wait for room would be timed waiting."""
    for work in works:
        if work.prompt + work.answer > config.max_context:
            raise ConfigError(
                f"{work.name}: {work.prompt + work.answer} tokens with the answer; the longest context is "
                f"{config.max_context}. Lower --prompt, --context or --answer"
            )
        if work.num_tokens > config.pool_tokens:
            raise CapacityError(
                f"{work.name}: {work.num_tokens} tokens at once, and the KV cache has room for {config.pool_tokens}. "
                "Use fewer --streams, or a shorter --context or --answer"
            )


def _print(model: str, config: ResolvedConfig, figures: Mapping[str, Sequence[float]]) -> None:
    # Piped to another program, rows stay whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    on = f", {config.threads} threads" if config.device == "cpu" else ""
    where = f"{machine()['cpu']}{on}" if config.device == "cpu" else config.device
    speculation = ", with speculation" if config.speculation else ""
    console.print(f"{model} on {where}, {config.kernels} kernels, {config.dtype}{speculation}\n")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("tokens per second")
    for column in ("median", "lowest", "highest"):
        table.add_column(column, justify="right")
    for name, values in figures.items():
        found: dict[str, Any] = summary(values)
        table.add_row(name, *(f"{found[key]:,.1f}" for key in ("median", "min", "max")))
    console.print(table)
