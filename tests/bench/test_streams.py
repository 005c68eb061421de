"""How a response is judged: only a whole answer, once, is a whole answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from turbolm.bench.streams import Ending, Errand, judge, run

STREAM, WHOLE = Errand("x", 4, True), Errand("x", 4, False)
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def event(text: str = "", reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode() + b"\n\n"


ERROR = b'data: {"error": {"message": "the engine died"}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        ((event("ab"), b": keep-alive\n\n", event("cd", "length"), DONE), "done"),
        ((event("ab"), event("cd"), event("", "length"), DONE), "done"),
        ((event("ab"), ERROR, DONE), "failed"),
        ((event("ab"), event("cd", "length")), "wrong"),
        ((event("ab", "length"), DONE), "wrong"),
        ((event("ab", "length"), event("cd", "length"), DONE), "wrong"),
        ((event("ab", "length"), event("cd"), DONE), "wrong"),
        ((event("abcd", "length"), ERROR, DONE), "wrong"),
        ((ERROR, event("ab"), DONE), "wrong"),
        ((ERROR, ERROR, DONE), "wrong"),
        ((event("abcd", "length"), DONE, DONE), "wrong"),
        ((b"nonsense\n\n", DONE), "wrong"),
    ],
)
def test_streams(pieces, outcome):
    assert judge(chunked(*pieces), STREAM).outcome == outcome


def test_a_stream_that_is_cut_off():
    whole = chunked(event("abcd", "length"), DONE)
    for end in range(len(HEAD), len(whole) - 4):
        assert judge(whole[:end], STREAM).outcome == "wrong", end


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"text": "abcd", "finish_reason": "length"}]}', "done"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"text": "abc", "finish_reason": "length"}]}', "wrong"),
        (b'HTTP/1.1 500 Oh\r\n\r\n{"error": {"message": "died"}}', "failed"),
        (b"HTTP/1.1 429 Busy\r\n\r\n{}", "refused"),
        (b"HTTP/1.1 500 Oh\r\n\r\n", "wrong"),
        (b"", "wrong"),
    ],
)
def test_whole_answers(answer, outcome):
    assert judge(answer, WHOLE).outcome == outcome


@pytest.mark.parametrize(("leaves_after", "ending"), [(0.05, "left"), (None, "hung")])
def test_a_server_that_says_nothing(leaves_after, ending):
    async def scene() -> tuple[Ending, bytes]:
        received = []

        async def silent(reader, writer):
            received.append(await reader.read(-1))  # until the client is gone
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await run("127.0.0.1", port, Errand("x", 4, True, leaves_after), timeout=0.1)
        while not received:
            await asyncio.sleep(0.01)
        server.close()
        return found, received[0]

    found, sent = asyncio.run(scene())
    assert found.outcome == ending
    assert sent.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert json.loads(sent.partition(b"\r\n\r\n")[2])["max_tokens"] == 4
