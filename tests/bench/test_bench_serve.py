"""`turbolm bench serve` against small servers, and what it makes of timings."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest

from turbolm.bench.client import Server, Timing, ask
from turbolm.bench.serve import Goal, summarize
from turbolm.cli.main import main
from turbolm.errors import ConfigError


def chunk(**fields: object) -> bytes:
    data = b"data: " + json.dumps(fields).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


class FakeServer:
    """Answers each POST with three tokens and each GET with one model."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict]] = []
        self.status = b"200 OK"
        self.events = [chunk(choices=[{"text": text, "finish_reason": None}]) for text in "abc"]
        self.events.append(chunk(choices=[{"text": "", "finish_reason": "length"}]))
        self.events.append(chunk(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3}))
        self.end = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            body = json.dumps({"data": [{"id": "m"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        else:
            size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            self.requests.append((head.split()[1], json.loads(await reader.readexactly(size))))
            writer.write(b"HTTP/1.1 " + self.status + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in self.events:
                writer.write(event[:9])  # chunks come in pieces
                await asyncio.sleep(0.005)
                writer.write(event[9:])
            writer.write(self.end)
        await writer.drain()
        writer.close()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def test_figures_of_a_run(fake, tmp_path, capsys):
    report, plot = tmp_path / "run.json", tmp_path / "run.svg"
    options = ["--requests", "12", "--concurrency", "3", "--prompt", "7", "--answer", "3", "--deadline", "30"]
    assert main(["bench", "serve", fake.url, *options, "--json", str(report), "--plot", str(plot)]) == 0
    found = json.loads(report.read_text())
    assert (found["done"], found["failed"], found["good"]) == (12, 0, 12)
    assert found["answer_tokens_per_second"] == pytest.approx(36 / found["seconds"])
    assert 0.005 <= found["latency"]["between events"]["p50"] < 1
    assert len(found["requests"]) == 12
    assert "12 answers" in capsys.readouterr().out
    assert plot.read_text().startswith("<?xml")
    path, body = fake.requests[0]
    assert path == "/v1/completions"
    assert (len(body["prompt"].split()), body["max_tokens"], body["stream"], body["model"]) == (7, 3, True, "m")


def test_arrivals_are_random_but_the_same_for_a_seed(fake, tmp_path):
    def due(seed: int) -> list[float]:
        report = tmp_path / "run.json"
        options = ["--requests", "10", "--rate", "200", "--seed", str(seed), "--json", str(report)]
        assert main(["bench", "serve", fake.url, *options]) == 0
        return [row["due"] for row in json.loads(report.read_text())["requests"]]

    first = due(1)
    assert first == sorted(first)
    assert len(set(first)) == 10
    assert due(1) == first != due(2)


def test_prompts_from_a_file(fake, tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    path.write_text('{"prompt": "one"}\n\n' + json.dumps(chat) + "\n")
    assert main(["bench", "serve", fake.url, "--requests", "4", "--concurrency", "1", "--prompts", str(path)]) == 0
    assert [path for path, _ in fake.requests] == ["/v1/completions", "/v1/chat/completions"] * 2
    assert chat.items() <= fake.requests[1][1].items()


def test_failures_are_counted_and_shown(fake, capsys):
    fake.status = b"429 Too Many Requests"
    assert main(["bench", "serve", fake.url, "--requests", "2"]) == 1
    assert "every request failed" in capsys.readouterr().err
    fake.status, fake.end = b"200 OK", b""
    fake.events = fake.events[:2]
    timing = asyncio.run(ask(Server.at(fake.url), "completions", {}, 0.0, 0.0, 10))
    assert timing.error


@pytest.mark.parametrize(
    "options",
    [
        ["--requests", "0"],
        ["--rate", "0"],
        ["--rate", "1", "--concurrency", "1"],
        ["--deadline", "-1"],
        ["--prompts", "none.jsonl"],
        ["--key-env", "NO_SUCH_VARIABLE"],
        ["--model", "other"],
    ],
)
def test_options_that_can_not_be_used(fake, options):
    assert main(["bench", "serve", fake.url, *options]) == 2


@pytest.mark.parametrize("text", ["x", '{"prompt": "a", "messages": []}', '{"prompt": "a", "n": 2}', ""])
def test_files_that_can_not_be_used(fake, tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    assert main(["bench", "serve", fake.url, "--prompts", str(path)]) == 2


def test_addresses():
    assert Server.at("http://h/v1/") == Server("h", 80, False, "/v1")
    assert Server.at("https://h:1/a") == Server("h", 1, True, "/a/v1")
    for url in ("h:80", "ftp://h", "http://", "http://h:x"):
        with pytest.raises(ConfigError):
            Server.at(url)


def test_goodput_counts_what_was_in_time():
    timings = [
        Timing(0, first=0.1, last=1.1, gaps=[0.5, 0.5], answer_tokens=3, finish="stop"),
        Timing(0, first=0.9, last=1.0, answer_tokens=1, finish="stop"),
        Timing(0, first=0.1, last=0.2, error="no"),
    ]
    found = summarize(timings, 2.0, Goal(0.5, 2.0))
    assert (found["done"], found["failed"], found["good"], found["goodput"]) == (2, 1, 1, 0.5)
    assert found["latency"]["per token"]["p50"] == pytest.approx(0.5)
    assert found["latency"]["whole answer"]["max"] == 1.1
    assert summarize([], 1.0, Goal(None, None))["latency"]["first token"] is None
