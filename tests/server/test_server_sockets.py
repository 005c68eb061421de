"""What arrives over a raw socket: broken framing, clients that stop, dawdle or never end. Each conversation ends in
bounded time, with a refusal or a closed connection, while another client's streams go on; and nothing is left."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

from turbolm.bench.streams import Errand, judge
from turbolm.server import body as body_module
from turbolm.server import protocol

SECONDS = 20.0  # for each of these conversations, on a busy machine
LIMIT = 0.5  # of the server's patience, in these tests
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = json.dumps({"prompt": "hello", "max_tokens": 3}).encode()
STREAM = json.dumps({"prompt": "hello", "max_tokens": 3, "stream": True}).encode()


def sized(body: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Witness:
    """A client whose streams, one after the other over one connection, must not notice anything."""

    errand = Errand("x", 50, streams=True)
    request = sized(
        json.dumps({"prompt": "x", "max_tokens": 50, "stream": True, "ignore_eos": True, "temperature": 0}).encode()
    )

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_whole = 0
        self.faults: list[str] = []

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while not (self.faults or self._stop.wait(0.05)):  # leaves the machine to the test
            try:
                self._stream()
            except OSError as error:
                self.faults.append(repr(error))

    def _stream(self) -> None:
        self._connection.sendall(self.request)
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += (chunk := self._connection.recv(65536))
            if not chunk:
                break
        ending = judge(received, self.errand)
        if ending.outcome == "done":
            self.num_whole += 1
        else:
            self.faults.append(str(ending))


@pytest.fixture(autouse=True)
def others_notice_nothing(null, null_llm, monkeypatch, wait_until):
    """The server's patience is short; a witness streams beside each test; blocks and places are free afterwards."""
    with Witness(null.port) as witness:
        wait_until(lambda: witness.num_whole or witness.faults, 3 * SECONDS)
        monkeypatch.setattr(protocol, "HEAD_SECONDS", LIMIT)  # from the next connection on
        monkeypatch.setattr(body_module, "BODY_SECONDS", LIMIT)
        before = witness.num_whole
        yield
        wait_until(lambda: witness.num_whole > before or witness.faults, 3 * SECONDS)
    assert not witness.faults
    wait_until(lambda: null.service.num_admitted == 0 and null_llm.stats.num_used_blocks == 0, 3 * SECONDS)


@contextlib.contextmanager
def connection(null):
    with socket.create_connection(("127.0.0.1", null.port), timeout=SECONDS) as found:
        yield found


def read_all(found: socket.socket) -> bytes:
    """All that comes until the server hangs up, within SECONDS."""
    received, deadline = b"", time.monotonic() + SECONDS
    with contextlib.suppress(ConnectionResetError):  # it left bytes of ours unread
        while chunk := found.recv(65536):
            received += chunk
            assert time.monotonic() < deadline, "no end"
    return received


def talk(null, data: bytes, finish: bool = False) -> bytes:
    with connection(null) as found:
        with contextlib.suppress(OSError):  # it may hang up before it has all
            found.sendall(data)
            if finish:
                found.shutdown(socket.SHUT_WR)
        return read_all(found)


REFUSED = {
    "nonsense": b"hello\r\n\r\n",
    "a TLS handshake": bytes.fromhex("16030100a5010000a1030365") + b"x" * 150,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a method that is none": b"PO(ST / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a zero byte in a header": b"GET /health HTTP/1.1\r\nHost: x\0y\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n" + BODY,
    "a length that is no number": HEAD + b"Content-Length: 1e3\r\n\r\n" + BODY,
    "a length beyond 64 bits": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n" + BODY,
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_framing_is_refused_and_the_connection_closed(null, name):
    assert talk(null, REFUSED[name])[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"")


BROKEN_CHUNKS = {
    "a size that is no number": b"zz\r\nhello\r\n",
    "a negative size": b"-5\r\nhello\r\n",
    "a size beyond 64 bits": b"F" * 40 + b"\r\nhello\r\n",
    "a chunk longer than its size": b"2\r\nhello\r\n0\r\n\r\n",
    "a size without an end": b"1" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
def test_broken_chunks_are_refused(null, name):
    assert talk(null, CHUNKED + BROKEN_CHUNKS[name])[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 408", b"")


@pytest.mark.parametrize("data", [
    b"", b"POST", HEAD, HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b"Content-Length: 100\r\n\r\n" + BODY, CHUNKED,
    CHUNKED + b"5\r\nhe", CHUNKED + b"5\r\nhello\r\n", CHUNKED + b"5\r\nhello\r\n0\r\n",
])  # fmt: skip
@pytest.mark.parametrize("finish", [True, False], ids=["half-closed", "silent"])
def test_a_request_that_stops_in_the_middle_ends(null, data, finish):
    assert talk(null, data, finish)[:12] in (b"", b"HTTP/1.1 408", b"HTTP/1.1 400")


def drip(found: socket.socket, data: bytes) -> None:
    """A byte at a time, slower than the server's patience for all of it."""
    for position in range(len(data)):
        found.sendall(data[position : position + 1])
        time.sleep(3 * LIMIT / len(data))


@pytest.mark.parametrize(("sent", "dripped", "status"), [
    (b"", HEAD, b""),
    (HEAD, b"X-Slow: yes\r\n" * 4, b""),
    (HEAD + b"Content-Length: 60\r\n\r\n", BODY + b" " * 20, b"HTTP/1.1 408"),
    (CHUNKED, b"1\r\n \r\n" * 10, b"HTTP/1.1 408"),
])  # fmt: skip
def test_a_slow_loris_is_cut_off(null, sent, dripped, status):
    with connection(null) as found:
        found.sendall(sent)
        with contextlib.suppress(OSError):
            drip(found, dripped)
        assert read_all(found)[:12] in (status, b"")


@pytest.mark.parametrize(("start", "piece"), [
    (CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    (HEAD + b"Content-Length: 999999999999\r\n\r\n", b" " * 65536),
    (b"GET /health HTTP/1.1\r\n", b"X-More: and more\r\n" * 1000),
    (b"GET /" + b"x" * 1000, b"y" * 65536),
])  # fmt: skip
def test_what_never_ends_is_cut_off(null, start, piece):
    with connection(null) as found:
        found.sendall(start)
        with pytest.raises(OSError):
            for _ in range(2000):  # 35 MB and more
                found.sendall(piece)


def test_pipelined_requests_are_answered_in_order(null):
    bodies = [json.dumps({"prompt": "x" * size, "max_tokens": 2}).encode() for size in (3, 5, 7)]
    last = sized(bodies[2], HEAD + b"Connection: close\r\n")
    received = talk(null, sized(bodies[0]) + sized(bodies[1]) + last)
    assert received.count(b"HTTP/1.1 200") == 3
    found = [int(piece.partition(b",")[0]) for piece in received.split(b'"prompt_tokens":')[1:]]
    assert found == [3, 5, 7]


def test_a_pipelined_request_after_a_broken_one_is_not_served(null):
    received = talk(null, CHUNKED + b"zz\r\n" + sized(BODY))
    assert b"HTTP/1.1 200" not in received


def test_who_waits_for_100_continue_gets_it(null):
    head = HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    with connection(null) as found:
        found.sendall(head)
        assert found.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        found.sendall(BODY)
        assert read_all(found).startswith(b"HTTP/1.1 200")
    silent = talk(null, head)
    assert silent.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 408")
    refused = talk(null, head.replace(b"/v1/completions", b"/v1/nothing"))
    assert refused.startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize("data", [BODY, STREAM], ids=["whole", "stream"])
def test_http_1_0_gets_no_chunks(null, data):
    received = talk(null, sized(data, HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    if data is STREAM:
        *events, done, rest = body.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events)
    else:
        assert json.loads(body)["choices"]


def test_hundreds_of_silent_connections_lock_nobody_out(null):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connection(null)) for _ in range(300)]
        assert null.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
        assert all(read_all(found) == b"" for found in silent)  # they are hung up on
