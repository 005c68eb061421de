"""turbolm's HTTP server beside vLLM's and LMDeploy's, each over an engine that computes nothing: streamed tokens and
requests per second, in alternating rounds of one run, and their ratios.

    python benchmarks/front_ends.py --peer vllm=PYTHON --peer lmdeploy=PYTHON [--save]

PYTHON is that of an environment with the peer. Without a GPU their dependencies can't be resolved as they are; the
servers alone need little (1.6 GB with the wheels of vLLM 0.33.0 and LMDeploy 0.18.0; CPU torch is enough):

    python -m venv peers
    peers/bin/pip install torch --index-url …/cpu        # or a .pth file that leads to an environment with torch
    peers/bin/pip install --no-deps vllm lmdeploy xgrammar compressed-tensors depyf lm-format-enforcer interegular \\
        astor dill loguru apache-tvm-ffi
    peers/bin/pip install transformers regex cachetools blake3 py-cpuinfo 'fastapi[standard]<0.137' aiohttp tiktoken \\
        lark partial-json-parser pyzmq msgspec 'mistral_common[image]' opencv-python-headless einops cloudpickle \\
        python-json-logger pybase64 cbor2 ijson setproctitle oss-harmony openai_harmony \\
        'prometheus-fastapi-instrumentator>=8' model-hosting-container-standards 'mcp>=2.2,<3' \\
        opentelemetry-semantic-conventions-ai opentelemetry-exporter-otlp fire mmengine-lite shortuuid outlines_core \\
        'setuptools<81' accelerate peft

The comparison is kind to them: their engine's client hands over finished text in the server's own process
(benchmarks/peer_front_ends.py), while turbolm is `turbolm serve` as it is, whose engine schedules every token in a
process of its own, and whose server turns token ids into text. A client that reads nothing else measures all alike.
Where turbolm's server falls behind its engine, an event carries several tokens; theirs carry one. Both are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
from measure import machine, save
from server_streams import Client, cpu_seconds, server

SCRIPT = Path(__file__).with_name("peer_front_ends.py")
START_SECONDS = 600


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def peer(name: str, python: str) -> Iterator[Callable[[], tuple[psutil.Process, int]]]:
    """A peer's server; what is yielded waits until it is ready."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command = [python, str(SCRIPT), name, str(port), folder]
        # A connection that is done waits for the others of its round.
        patience = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600", "UVICORN_TIMEOUT_KEEP_ALIVE": "600"}
        environment = os.environ | patience
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment) as process:
            try:
                yield lambda: wait_until_ready(process, port, log)
            finally:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[str]) -> tuple[psutil.Process, int]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
            return psutil.Process(process.pid), port
        time.sleep(0.5)
    log.seek(0)
    raise SystemExit(f"{process.args[2]} didn't start:\n{log.read()[-3000:]}")


def measure(process: psutil.Process, client: Client, streams: int, tokens: int, repeats: int) -> dict[str, float]:
    """Rounds of `streams` answers of so many tokens, one round after the other."""
    processes = [process, *process.children(recursive=True)]
    before = sum(map(cpu_seconds, processes))
    started = time.perf_counter()
    events = sum(client.round() for _ in range(repeats))
    seconds = time.perf_counter() - started
    cpu = sum(map(cpu_seconds, processes)) - before
    requests = streams * repeats
    return {
        "requests_per_second": requests / seconds,
        "tokens_per_second": requests * tokens / seconds,
        "tokens_per_event": requests * tokens / events,
        "cpu_us_per_token": cpu / (requests * tokens) * 1e6,
        "cpu_us_per_request": cpu / requests * 1e6,
    }


def summarize(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and turbolm's by each peer's, which are medians of the rounds' ratios."""
    found = {}
    for name, rows in rounds.items():
        found[name] = {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
        if name != "turbolm":
            pairs = list(zip(rounds["turbolm"], rows, strict=True))
            for key in ("requests_per_second", "tokens_per_second"):
                ratio = statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)
                found[name][f"turbolm_{key}_ratio"] = round(ratio, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="vllm or lmdeploy")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    options = parser.parse_args()
    record: dict[str, object] = {"machine": machine(), "streams": options.streams, "tokens": options.tokens}
    with contextlib.ExitStack() as stack:
        peers = dict(given.split("=", 1) for given in options.peer)
        starts = {name: stack.enter_context(peer(name, python)) for name, python in peers.items()}
        servers = {"turbolm": stack.enter_context(server(options.streams))}
        servers |= {name: wait() for name, wait in starts.items()}
        for title, tokens, repeats in (("long answers", options.tokens, 1), ("answers of one token", 1, 4)):
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for number in range(options.rounds + 1):
                for name, (process, port) in servers.items():
                    client = Client(port, options.streams, tokens)
                    row = measure(process, client, options.streams, tokens, repeats)
                    client.close()
                    if number:  # the first warms up
                        rounds[name].append(row)
                        print(title, name, json.dumps({key: round(value, 1) for key, value in row.items()}), flush=True)
            record[title] = {"medians": summarize(rounds), "rounds": rounds}
            print(json.dumps(record[title]["medians"], indent=1), flush=True)
    if options.save:
        print(save("front_ends", record))


if __name__ == "__main__":
    sys.exit(main())
