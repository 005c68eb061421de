"""`turbolm chaos`: a server under load, clients that hang up, an engine that is killed again and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from turbolm.bench import streams as load
from turbolm.bench.figure import figure_file
from turbolm.bench.record import check_writable, machine, write_record
from turbolm.errors import ConfigError, EngineError

_SAMPLE_SECONDS = 1.0
_SETTLE_SECONDS = 20.0  # after the last request, for the server to be at rest
_MAX_GROWTH = 1.25  # of the server's memory, second half by first
_HANG_SECONDS = 180.0


@dataclass(slots=True)
class Soak:
    """What was seen."""

    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_kills: int = 0
    num_logged: int = 0  # requests that the server has a log line of
    seconds: float = 0.0
    memory: list[tuple[float, float, float]] = field(default_factory=list)  # seconds, MB of the server, of the engine
    kills: list[float] = field(default_factory=list)  # seconds
    at_rest: Mapping[str, float] = field(default_factory=dict)  # the server's metrics afterwards

    def growth(self) -> float:
        """The server's memory: median of the last third by that of the middle one (in the first it warms up)."""
        third = len(self.memory) // 3
        sizes = [server for _, server, _ in self.memory]
        return statistics.median(sizes[-third:]) / statistics.median(sizes[third:-third]) if third else 1.0

    def faults(self, num_requests: int) -> list[str]:
        """What should not have been."""
        found = [f"{count} requests {what}" for what in ("hung", "wrong") if (count := self.endings[what])]
        found += self.wrong[:5]
        num_unseen = num_requests - self.num_logged  # hung up on before the server had read them, perhaps
        if self.endings.total() != num_requests or not 0 <= num_unseen <= self.endings["left"]:
            found.append(f"{num_requests} requests, {self.endings.total()} endings, {self.num_logged} log lines")
        if self.at_rest.get("vllm:kv_cache_usage_perc") != 0:
            found.append("KV blocks are in use, and no request is")
        if self.at_rest.get("turbolm:engine_restarts_total") != self.num_kills:
            found.append(f"{self.num_kills} kills, {self.at_rest.get('turbolm:engine_restarts_total')} restarts")
        if self.growth() > _MAX_GROWTH:
            found.append(f"the server's memory grew by a factor of {self.growth():.2f}")
        return found


def chaos(
    model: str = "null",
    /,
    *,
    requests: int = 20_000,
    streams: int = 200,
    cancel: float = 0.33,
    kill_every: float = 60.0,
    tokens: int = 100,
    seed: int = 0,
    output: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
) -> None:
    """Start a server, put it under load, hang up on it, kill its engine, and check that nothing is lost.

    Every request has to end exactly once, with its whole answer or an error; afterwards all KV blocks have to be free
    and the server's memory as it was. Fails where that is not so.

    Parameters
    ----------
    model
        The model to serve: by default one without weights.
    requests
        How many requests, most of them streams.
    streams
        How many at once.
    cancel
        The part of the clients that hang up at a random moment.
    kill_every
        Seconds between kills (SIGKILL) of the engine's process; 0: none.
    tokens
        The longest answer.
    seed
        Of all that is random here.
    output
        Write the figures to this file.
    plot
        Draw the memory of both processes over time into this file (.svg, .png); needs matplotlib.
    """
    _check(requests=requests, streams=streams, tokens=tokens)
    if not 0 <= cancel <= 1 or kill_every < 0:
        raise ConfigError(f"cancel is a part, 0 to 1, and kill_every seconds; got {cancel} and {kill_every}")
    check_writable(output)
    check_writable(plot)
    soak = Soak()
    with _server(model, soak) as (process, port):
        errands = _errands(requests, cancel, tokens, random.Random(seed))
        asyncio.run(_soak(soak, process, port, errands, requests, streams, kill_every))
    faults = soak.faults(requests)
    _show(soak)
    if output is not None:
        settings = {"model": model, "requests": requests, "streams": streams, "cancel": cancel,
                    "kill_every": kill_every, "tokens": tokens, "seed": seed}  # fmt: skip
        write_record(output, {"machine": machine(), "settings": settings, **_record(soak), "faults": faults})
    if plot is not None:
        draw(soak, plot)
    if faults:
        raise EngineError("; ".join(faults))


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")


def _errands(count: int, cancel: float, tokens: int, rng: random.Random) -> Iterator[load.Errand]:
    for number in range(count):
        prompt = f"{number} " + "x" * rng.randrange(200)
        leaves = rng.expovariate(2.0) if rng.random() < cancel else None
        yield load.Errand(prompt, rng.randint(1, tokens), rng.random() < 0.8, leaves)


@contextlib.contextmanager
def _server(model: str, soak: Soak) -> Iterator[tuple[psutil.Process, int]]:
    """`turbolm serve` on a free port; its log lines are counted."""
    command = [sys.executable, "-m", "turbolm", "serve", model, "--port", "0", "--max-batch-size", "64"]
    head: list[str] = []
    found: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        for line in server.stderr:
            head.append(line)
            if found := re.findall(r"served at \S+:(\d+)/v1", line):
                break
        else:
            raise EngineError(f"the server didn't start: {''.join(head[-5:])}")
        counter = threading.Thread(target=_count_lines, args=(server.stderr, soak))
        counter.start()
        try:
            yield psutil.Process(server.pid), int(found[0])
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            finally:
                server.kill()
                counter.join()


def _count_lines(log: Any, soak: Soak) -> None:
    for line in log:
        if line.startswith("{"):
            soak.num_logged += json.loads(line)["method"] == "POST"


async def _soak(
    soak: Soak,
    server: psutil.Process,
    port: int,
    errands: Iterator[load.Errand],
    num_requests: int,
    num_streams: int,
    kill_every: float,
) -> None:
    started = time.monotonic()
    with _bar(num_requests) as advance:

        async def client() -> None:
            for errand in errands:
                ending = await load.run("127.0.0.1", port, errand, _HANG_SECONDS)
                soak.endings[ending.outcome] += 1
                if ending.outcome == "wrong":
                    soak.wrong.append(ending.note)
                advance()

        watch = asyncio.create_task(_watch(soak, server, port, kill_every, started))
        await asyncio.gather(*(client() for _ in range(num_streams)))
    soak.seconds = time.monotonic() - started
    watch.cancel()
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        soak.at_rest = await asyncio.to_thread(_metrics, port)
        restarts = soak.at_rest.get("turbolm:engine_restarts_total")
        if restarts == soak.num_kills and soak.at_rest.get("vllm:kv_cache_usage_perc") == 0:
            break
        await asyncio.sleep(0.5)


async def _watch(soak: Soak, server: psutil.Process, port: int, kill_every: float, started: float) -> None:
    """Samples memory and kills the engine, where it is at work."""
    next_kill = kill_every
    while True:
        await asyncio.sleep(min(_SAMPLE_SECONDS, kill_every / 2 or _SAMPLE_SECONDS))
        now = time.monotonic() - started
        engine = next(iter(server.children()), None)
        if engine is None:
            continue
        with contextlib.suppress(psutil.Error):
            soak.memory.append((round(now, 1), server.memory_info().rss / 1e6, engine.memory_info().rss / 1e6))
            if kill_every and now >= next_kill and await asyncio.to_thread(_is_ready, port):
                engine.kill()
                next_kill = now + kill_every
                soak.num_kills += 1
                soak.kills.append(round(now, 1))


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30):
            return True
    except OSError:
        return False


def _metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if "{" in line}


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _record(soak: Soak) -> dict[str, Any]:
    return {
        "seconds": round(soak.seconds, 1),
        "endings": dict(soak.endings),
        "kills": soak.kills,
        "restarts": soak.at_rest.get("turbolm:engine_restarts_total"),
        "kv_use_at_rest": soak.at_rest.get("vllm:kv_cache_usage_perc"),
        "growth": round(soak.growth(), 3),
        "memory": [(at, round(server, 1), round(engine, 1)) for at, server, engine in soak.memory],
    }


def _show(soak: Soak) -> None:
    count = soak.endings
    sizes = [server for _, server, _ in soak.memory] or [0.0]
    sys.stdout.write(
        f"{count.total()} requests in {soak.seconds:.0f} s: {count['done']} whole answers, {count['failed']} ended by "
        f"an error, {count['left']} hung up on, {count['refused']} refused, {count['hung']} without an end, "
        f"{count['wrong']} wrong\n"
        f"engine killed {soak.num_kills} times, started again "
        f"{soak.at_rest.get('turbolm:engine_restarts_total', 0):.0f} times\n"
        f"KV cache in use afterwards: {soak.at_rest.get('vllm:kv_cache_usage_perc', -1):.0%}; memory of the server: "
        f"{min(sizes):.0f} to {max(sizes):.0f} MB, last third by middle third {soak.growth():.2f}\n"
    )


def draw(soak: Soak, path: Path) -> None:
    """Memory over time, with the kills. Raises ConfigError, as `figure_file`."""
    times, server, engine = zip(*soak.memory, strict=True) if soak.memory else ((), (), ())
    with figure_file(path) as [axes]:
        axes.plot(times, server, label="server")
        axes.plot(times, engine, label="engine")
        for number, at in enumerate(soak.kills):
            axes.axvline(at, color="0.7", linewidth=0.8, zorder=0, label=None if number else "engine killed")
        axes.set(xlabel="seconds", ylabel="memory (MB)", ylim=(0, None))
        axes.legend(loc="lower right")
