"""Streamed tokens per second of `turbolm serve` with the model that costs nothing: what the front end can carry.

    python benchmarks/server_streams.py [--streams 256] [--tokens 256] [--rounds 5]

One client process reads all streams. On a machine that others use, too, the CPU time per token says more than the
clock: the server's two processes and the client may run at once.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from measure import machine, save

OPTIONS = ("--max-context", "2048", "--kv-memory", "500M", "--port", "0")


@contextmanager
def server(streams: int, *options: str) -> Iterator[tuple[psutil.Process, int]]:
    batch = ("--max-batch-size", str(streams))
    command = [sys.executable, "-m", "turbolm", "serve", "null", *OPTIONS, *batch, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if found := re.search(r"served at \S+:(\d+)/v1", line):
                break
        log = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # keeps the pipe empty
        try:
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            log.wait()


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


class Client:
    """Holds the connections open from round to round."""

    def __init__(self, port: int, streams: int, tokens: int) -> None:
        body = json.dumps({
            "model": "null", "prompt": "hello there", "max_tokens": tokens, "stream": True, "temperature": 0,
            "ignore_eos": True,
        }).encode()  # fmt: skip
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        self._request = (head % len(body)).encode() + body
        self._selector = selectors.DefaultSelector()
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
        for connection in self._sockets:
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, bytearray())

    def close(self) -> None:
        self._selector.close()
        for connection in self._sockets:
            connection.close()

    def round(self) -> int:
        """Sends every request, reads to the end of all; the number of events."""
        for connection in self._sockets:
            connection.send(self._request)
        open_streams, events = len(self._sockets), 0
        while open_streams:
            for key, _ in self._selector.select():
                data = key.fileobj.recv(1 << 18)
                assert data, "the server hung up"
                events += data.count(b"data: {")
                tail: bytearray = key.data
                tail += data
                if b"data: [DONE]" in tail:
                    open_streams -= 1
                    tail.clear()
                del tail[:-16]
        return events


def measure(streams: int, tokens: int, rounds: int, *options: str) -> list[dict[str, float]]:
    found = []
    with server(streams, *options) as (front, port):
        processes = {"front": front, "client": psutil.Process()} | dict(
            zip(("engine",), front.children(), strict=False)
        )
        client = Client(port, streams, tokens)
        for number in range(rounds + 1):
            before = {name: cpu_seconds(process) for name, process in processes.items()}
            started = time.perf_counter()
            events = client.round()
            seconds = time.perf_counter() - started
            total = streams * tokens
            row = {"tokens_per_second": round(total / seconds), "tokens_per_event": round(total / events, 2)}
            for name, process in processes.items():
                row[f"{name}_us_per_token"] = round((cpu_seconds(process) - before[name]) / total * 1e6, 1)
            if number:  # the first warms up
                found.append(row)
                print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    options = parser.parse_args()
    record = {"machine": machine(), "streams": options.streams, "tokens": options.tokens}
    for title, flags in (("isolated", ()), ("one process", ("--no-isolated",))):
        print(title)
        record[title] = measure(options.streams, options.tokens, options.rounds, *flags)
    if options.save:
        print(save("server_streams", record))


if __name__ == "__main__":
    main()
