"""Clients that leave, that read slowly, that come in crowds; deadlines."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import pytest

from turbolm.server.answer import Answer
from turbolm.server.config import ServerConfig
from turbolm.server.exchange import Exchange, Record
from turbolm.server.metrics import Metrics
from turbolm.types import Output, ReasoningPart, Request, TextPart, ToolCallPart, Usage

LONG = {"prompt": "hello", "max_tokens": 1900}


def idle(served) -> bool:
    return served.service.llm.stats.num_used_blocks == 0 and served.service.num_admitted == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(null, stream, wait_until):
    data = json.dumps(LONG | {"stream": stream, "n": 4}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", null.port)) as connection:
        connection.sendall(head % len(data) + data)
        wait_until(lambda: null.service.llm.stats.num_used_blocks > 0)
    steps = null.service.llm.stats.num_steps
    wait_until(lambda: idle(null))
    assert null.service.llm.stats.num_steps - steps < 1000
    assert null.service.metrics.requests["/v1/completions", "gone", 200 if stream else 0] > 0


def test_a_slow_reader_gets_everything(null):
    with httpx.stream("POST", f"{null.url}/v1/completions", json=LONG | {"stream": True, "temperature": 0}) as response:
        lines = response.iter_lines()
        first = next(lines)
        time.sleep(0.5)  # the answer piles up meanwhile
        rest = [line for line in lines if line]
    chunks = [json.loads(line[6:]) for line in (first, *rest[:-1])]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    whole = null.client.completions.create(model="null", **LONG, temperature=0)
    assert text == whole.choices[0].text


def test_deltas_that_pile_up_are_merged():
    answer = Answer()
    for piece in ("a", "b", "c"):
        answer.add(Output("r", parts=(ReasoningPart(piece), TextPart(piece.upper())), token_ids=(1,)))
    answer.add(Output("r", parts=(ToolCallPart(0, "{", "id", "f"),)))
    answer.add(Output("r", parts=(ToolCallPart(0, "}"), ToolCallPart(1, "[]", "id2", "g"))))
    assert (answer.reasoning, answer.text, answer.num_tokens) == ("abc", "ABC", 3)
    assert ("".join(answer.calls[0].arguments), answer.calls[0].name, answer.calls[1].id) == ("{}", "f", "id2")


def test_a_full_server_says_when_to_come_back(null_llm, serving, wait_until):
    endless = {"prompt": ["hello"] * 100, "max_tokens": 1900, "stream": True}
    with serving(null_llm, ServerConfig(max_requests=1)) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=endless) as response:
            lines = response.iter_lines()
            next(lines)
            refused = served.post("/v1/completions", LONG)
            assert served.get("/health").status_code == 200
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "server_busy"
        wait_until(lambda: idle(served))
        assert served.post("/v1/completions", LONG | {"max_tokens": 1}).status_code == 200


def test_requests_have_a_deadline(null_llm, serving, wait_until):
    endless = {"prompt": ["hello"] * 100, "max_tokens": 1900}
    with serving(null_llm, ServerConfig(request_timeout=0.3)) as served:
        response = served.post("/v1/completions", endless)
        assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
        events = served.post("/v1/completions", endless | {"stream": True}).text.split("\n\n")
        assert json.loads(events[-3][6:])["error"]["code"] == "timeout"
        assert events[-2:] == ["data: [DONE]", ""]
        wait_until(lambda: idle(served))


def test_silent_streams_get_comments(null_llm, monkeypatch, serving):
    class Silent:
        request = Request("r", (1,))

        def begin(self, sink):
            pass

        def end(self):
            pass

    with serving(null_llm, ServerConfig(ping_interval=0.1)) as served:
        monkeypatch.setattr(null_llm, "generate", lambda *_, **__: Silent())
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(3)] == [": keep-alive", "", ": keep-alive"]


def test_draining_finishes_what_runs_and_takes_nothing_new(null_llm, serving):
    with serving(null_llm, ServerConfig(drain_timeout=30)) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            served.service.is_draining = True
            assert served.get("/ready").status_code == 503
            assert served.post("/v1/completions", LONG).status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"
        asyncio.run(served.service.drain())
        assert idle(served)


class Pushes:
    """An exchange for one answer, and what went past its task."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.takes = True
        self.exchange = Exchange([self], 1, Record("r", "POST", "/"), Metrics("m", lambda: None, lambda: (0, 0)))

    def begin(self, sink) -> None:
        self.sink = sink

    def end(self) -> None:
        pass

    def push(self, choice: int, answer: Answer) -> bool:
        if self.takes:
            self.sent.append(answer.text)
        return self.takes

    def bring(self, text: str, **fields: object) -> None:
        self.sink(Output("r", 0, (1,), (TextPart(text),), **fields))


def test_what_comes_while_a_stream_waits_is_sent_without_its_task():
    async def run() -> None:
        pushes = Pushes()
        async with pushes.exchange as exchange:
            pushes.bring("a")  # the stream has not begun
            await exchange.news(pushes.push)
            assert [answer.text for answer in exchange.take().values()] == ["a"] and pushes.sent == []
            waiting = asyncio.create_task(exchange.news(pushes.push))
            await asyncio.sleep(0)
            pushes.bring("b")
            pushes.bring("c")
            await asyncio.sleep(0)
            assert pushes.sent == ["b", "c"] and not waiting.done()
            pushes.takes = False  # the client is behind: from now on everything waits for the task, in order
            pushes.bring("d")
            pushes.takes = True
            pushes.bring("e")
            await waiting
            pushes.bring("f")
            assert [answer.text for answer in exchange.take().values()] == ["def"] and pushes.sent == ["b", "c"]
            waiting = asyncio.create_task(exchange.news(pushes.push))
            await asyncio.sleep(0)
            pushes.bring("g", finish_reason="length", usage=Usage(1, 7))
            await waiting
            assert exchange.is_over and exchange.take()[0].final is not None and pushes.sent == ["b", "c"]
            assert exchange.record.answer_tokens == 7

    asyncio.run(run())


def test_an_event_that_cannot_be_written_ends_its_stream_alone():
    async def run() -> None:
        pushes = Pushes()

        def broken(choice: int, answer: Answer) -> bool:
            raise ValueError

        async with pushes.exchange as exchange:
            waiting = asyncio.create_task(exchange.news(broken))
            await asyncio.sleep(0)
            pushes.bring("a")
            await waiting
            assert exchange.error is not None

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_is_valid_however_its_events_are_written(null, count):
    data = json.dumps({"prompt": "hello", "max_tokens": 200, "stream": True, "temperature": 0, "n": count}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    whole = null.client.completions.create(model="null", prompt="hello", max_tokens=200, temperature=0)
    with socket.create_connection(("127.0.0.1", null.port)) as connection:
        for _ in range(2):  # on the same connection
            connection.sendall(head % len(data) + data)
            received = b""
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += connection.recv(1 << 16)
            body = received.partition(b"\r\n\r\n")[2]
            events = []
            while (size := int(body.partition(b"\r\n")[0], 16)) > 0:
                start = body.index(b"\r\n") + 2
                events += body[start : start + size].decode().split("\n\n")[:-1]
                assert body[start + size : start + size + 2] == b"\r\n"
                body = body[start + size + 2 :]
            assert events.pop() == "data: [DONE]"
            texts = ["" for _ in range(count)]
            for event in events:
                (choice,) = json.loads(event[6:])["choices"]
                texts[choice["index"]] += choice["text"]
            assert texts == [whole.choices[0].text] * count
