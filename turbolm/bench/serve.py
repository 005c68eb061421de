"""`turbolm bench serve`: how fast an OpenAI-compatible server answers under load."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from turbolm.bench.client import Server, Timing, ask
from turbolm.bench.figure import figure_file
from turbolm.bench.record import check_writable, machine, write_record
from turbolm.errors import ConfigError, EngineError
from turbolm.remote import RemoteLLM

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name president team minute idea body back parent face level office"
)
_QUANTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Load:
    """When requests come: `rate` a second, at random, whatever becomes of those before; or, where that is None, each
    of `concurrency` clients asks again when it has its answer."""

    rate: float | None
    concurrency: int
    seed: int
    timeout: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What makes an answer good: seconds to its first token, and to its end; None: any."""

    first: float | None
    whole: float | None

    def is_met(self, timing: Timing) -> bool:
        if timing.error is not None or timing.first is None:
            return False
        return timing.first <= (self.first or float("inf")) and timing.last <= (self.whole or float("inf"))


def serve(
    url: str,
    /,
    *,
    model: str | None = None,
    requests: int = 200,
    rate: float | None = None,
    concurrency: int | None = None,
    prompt: int = 128,
    answer: int = 128,
    prompts: Path | None = None,
    first_deadline: float | None = None,
    deadline: float | None = None,
    timeout: float = 600.0,
    seed: int = 0,
    key_env: str | None = None,
    output: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
) -> None:
    """Put an OpenAI-compatible server under load, and time its streams.

    With --rate, requests come at random moments (a Poisson process), however slow the server is, and times count from
    when a request was due. With --concurrency so many clients ask one request after the other.

    Parameters
    ----------
    url
        The server's address, such as http://127.0.0.1:23333.
    model
        The model to ask; by default the first that the server lists.
    requests
        How many requests.
    rate
        Requests per second, on average.
    concurrency
        Clients, instead of a rate; 8 where neither is given.
    prompt
        Words of each prompt, drawn at random; about as many tokens, but with the null model several times as many: its
        tokens are letters. The figures say how many they were.
    answer
        Tokens of each answer; the end of the text is ignored.
    prompts
        JSON lines to ask instead, each with "prompt" or "messages", and perhaps "max_tokens".
    first_deadline
        An answer is good if its first token comes within so many seconds ...
    deadline
        ... and its end within so many.
    timeout
        A request that takes longer has failed.
    seed
        Of arrivals and prompts.
    key_env
        Environment variable that holds the server's API key.
    output
        Write all figures, request by request, to this JSON file.
    plot
        Draw the distributions into this file (.svg, .png); needs matplotlib.
    """
    _check(requests, rate, concurrency, prompt, answer, (timeout, deadline, first_deadline))
    check_writable(output)
    check_writable(plot)
    key = _key(key_env)
    server = Server.at(url, key)
    name = RemoteLLM(url, model, key).model_name
    bodies = _file_bodies(prompts, requests) if prompts is not None else _synthetic(requests, prompt, answer, seed)
    load = Load(rate, concurrency or 8, seed, timeout)
    with _bar(requests) as bar:
        task = bar.add_task("", total=requests)
        seconds, timings = asyncio.run(measure(server, name, bodies, load, lambda: bar.advance(task)))
    figures = summarize(timings, seconds, Goal(first_deadline, deadline))
    _show(figures, timings)
    if output is not None:
        settings = {"url": url, "model": name, "requests": requests, "rate": rate, "prompt": prompt, "answer": answer,
                    "concurrency": None if rate else load.concurrency, "prompts": str(prompts) if prompts else None,
                    "seed": seed, "first_deadline": first_deadline, "deadline": deadline}  # fmt: skip
        record = {"benchmark": "serve", "machine": machine(), "settings": settings, **figures}
        write_record(output, {**record, "requests": [_row(timing) for timing in timings]})
    if plot is not None:
        draw(timings, plot)
    if figures["failed"] == len(timings):
        raise EngineError(f"every request failed; the first: {timings[0].error}")


async def measure(
    server: Server, model: str, bodies: Sequence[Mapping[str, Any]], load: Load, advance: Callable[[], None]
) -> tuple[float, list[Timing]]:
    """Seconds that the run took, and the timings by request."""
    shared = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    rng = np.random.default_rng(load.seed)
    start = time.perf_counter()

    async def one(body: Mapping[str, Any], due: float) -> Timing:
        await asyncio.sleep(start + due - time.perf_counter())
        path = "chat/completions" if "messages" in body else "completions"
        timing = await ask(server, path, {**shared, **body}, due, start, load.timeout)
        advance()
        return timing

    if load.rate is not None:
        arrivals = np.cumsum(rng.exponential(1 / load.rate, len(bodies))).tolist()
        timings = await asyncio.gather(*map(one, bodies, arrivals))
        return time.perf_counter() - start, list(timings)
    found: dict[int, Timing] = {}
    numbered = iter(enumerate(bodies))

    async def client() -> None:
        for number, body in numbered:
            found[number] = await one(body, time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    return time.perf_counter() - start, [found[number] for number in range(len(bodies))]


def summarize(timings: Sequence[Timing], seconds: float, goal: Goal) -> dict[str, Any]:
    """The figures of a run. Latencies are in seconds, those of requests that failed left out."""
    done = [timing for timing in timings if timing.error is None]
    good = sum(goal.is_met(timing) for timing in timings)
    latencies = {
        "first token": [timing.first for timing in done if timing.first is not None],
        "between events": [gap for timing in done for gap in timing.gaps],
        "per token": [value for timing in done if (value := timing.per_token) is not None],
        "whole answer": [timing.last for timing in done],
    }
    return {
        "seconds": seconds,
        "done": len(done),
        "prompt_tokens": sum(timing.prompt_tokens for timing in done) / max(len(done), 1),  # on average
        "failed": len(timings) - len(done),
        "requests_per_second": len(done) / seconds,
        "prompt_tokens_per_second": sum(timing.prompt_tokens for timing in done) / seconds,
        "answer_tokens_per_second": sum(timing.answer_tokens for timing in done) / seconds,
        "good": good,
        "goodput": good / seconds,  # requests per second
        "latency": {name: _distribution(values) for name, values in latencies.items()},
    }


def _distribution(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    quantiles = np.percentile(values, _QUANTILES).tolist()
    named = {f"p{quantile}": value for quantile, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": max(values)}


def _synthetic(count: int, prompt: int, answer: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, prompt])  # apart from the arrivals'
    words = _WORDS.split()
    return [
        {"prompt": " ".join(rng.choice(words, prompt)), "max_tokens": answer, "ignore_eos": True} for _ in range(count)
    ]


def _file_bodies(path: Path, count: int) -> list[dict[str, Any]]:
    """As many requests as asked for; from the beginning again where the file has fewer."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: can't read '{path}' ({error})") from None
    bodies = list(_parsed(lines, path))
    if not bodies:
        raise ConfigError(f"prompts: '{path}' is empty; write a JSON object a line")
    return [bodies[number % len(bodies)] for number in range(count)]


def _parsed(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
            raise ConfigError(f'prompts: line {number} of {path} must be an object with either "prompt" or "messages"')
        if unknown := value.keys() - {"prompt", "messages", "max_tokens"}:
            raise ConfigError(
                f"prompts: line {number} of {path} has '{min(unknown)}'; known: prompt, messages, max_tokens"
            )
        yield value


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key or not key.isprintable():
        raise ConfigError(f"key_env: the environment variable {name} holds no key")
    return key


def _check(
    requests: int,
    rate: float | None,
    concurrency: int | None,
    prompt: int,
    answer: int,
    times: Sequence[float | None],
) -> None:
    for name, value in (("requests", requests), ("concurrency", concurrency), ("prompt", prompt), ("answer", answer)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be 1 or more, got {value}")
    if rate is not None and concurrency is not None:
        raise ConfigError("--rate and --concurrency exclude each other: give one")
    if rate is not None and not 0 < rate < 1e6:
        raise ConfigError(f"--rate is requests per second, above 0; got {rate:g}")
    if not all(value is None or 0 < value < 1e9 for value in times):
        raise ConfigError("--timeout, --deadline and --first-deadline are seconds, above 0")


def _bar(total: int) -> Progress:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or total < 2)


def _show(figures: Mapping[str, Any], timings: Sequence[Timing]) -> None:
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    console.print(
        f"{figures['done']} answers in {figures['seconds']:.1f} s, {figures['failed']} failed; prompts had "
        f"{figures['prompt_tokens']:.0f} tokens on average\n"
        f"{figures['requests_per_second']:.2f} requests/s, {figures['prompt_tokens_per_second']:,.0f} prompt tokens/s, "
        f"{figures['answer_tokens_per_second']:,.0f} answer tokens/s\n"
        f"goodput: {figures['goodput']:.2f} requests/s ({figures['good']} of {len(timings)} in time)\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("milliseconds")
    names = ("mean", *(f"p{quantile}" for quantile in _QUANTILES), "max")
    for name in names:
        table.add_column(name, justify="right")
    for name, found in figures["latency"].items():
        if found is not None:
            table.add_row(name, *(f"{found[column] * 1e3:,.1f}" for column in names))
    console.print(table)
    if errors := [timing.error for timing in timings if timing.error is not None]:
        console.print(f"\nthe first failure: {errors[0]}", markup=False)


def _row(timing: Timing) -> dict[str, Any]:
    return {
        "due": timing.due,
        "first": timing.first,
        "last": timing.last,
        "prompt_tokens": timing.prompt_tokens,
        "answer_tokens": timing.answer_tokens,
        "finish": timing.finish,
        "error": timing.error,
    }


def draw(timings: Sequence[Timing], path: Path) -> None:
    """How many answers were within a time. Raises ConfigError, as `figure_file`."""
    done = [timing for timing in timings if timing.error is None]
    series = (
        ("first token", [timing.first for timing in done if timing.first is not None]),
        ("per token", [value for timing in done if (value := timing.per_token) is not None]),
        ("whole answer", [timing.last for timing in done]),
    )
    with figure_file(path, len(series), 10.0) as all_axes:
        for axes, (name, values) in zip(all_axes, series, strict=True):
            axes.plot(np.sort(values) * 1e3, np.arange(1, len(values) + 1) / max(len(values), 1))
            axes.set(xlabel=f"{name} (ms)", xlim=(0, None), ylim=(0, 1))
        all_axes[0].set_ylabel("part of the answers")
