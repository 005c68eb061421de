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
from turbolm.types import Output, ReasoningPart, TextPart, ToolCallPart

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
