"""A corpus of what broken and hostile clients send, to every endpoint: refusals, no 5xx, and nothing left behind."""

from __future__ import annotations

import json
import socket
import struct
import threading

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.server.pages import describe

POSTS = sorted(path for path, methods in describe()["paths"].items() if "post" in methods)
EXAMPLES = {
    path: describe()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] for path in POSTS
}
DEEP = 50_000
BODIES = {
    "empty": b"",
    "half an object": b'{"model": "nu',
    "two objects": b"{}{}",
    "bytes that are no UTF-8": b'{"prompt": "\xc3\x28", "input": "\xff", "messages": "\xed\xa0\x80"}',
    "half a surrogate": b'{"prompt": "\\udfff", "input": "\\ud800", "text": "\\ud800", "tokens": "\\ud800"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "nulls": b"\0" * 1000,
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"messages":' * DEEP + b"1" + b"}" * DEEP,
    "deep messages": b'{"messages": [{"role": "user", "content": ' + b"[" * 150 + b"]" * 150 + b"}]}",
    "a number without end": b'{"max_tokens": ' + b"9" * 500_000 + b"}",
    "a huge exponent": b'{"temperature": 1e400000, "prompt": "x", "input": "x", "text": "x", "messages": []}',
    "not a number": b'{"temperature": NaN}',
    "a key without end": b'{"' + b"k" * 1_000_000 + b'": 1}',
    "many keys": json.dumps({f"k{i}": i for i in range(50_000)}).encode(),
    "the same key again": b'{"messages": 1, "messages": 2, "prompt": 3, "input": 4, "text": 5, "tokens": 6}',
    "a list": b"[1, 2]",
    "text": b"hello",
}


def send(null, path: str, body: bytes) -> httpx.Response:
    return httpx.post(f"{null.url}{path}", content=body, headers={"content-type": "application/json"}, timeout=30)


@pytest.mark.parametrize("path", POSTS)
def test_broken_bodies_are_refused_everywhere(null, path):
    for name, body in BODIES.items():
        response = send(null, path, body)
        assert response.status_code in (400, 413), (name, response.text[:200])
        assert response.json()["error"]["message"], name
        assert len(response.content) < 2000, name


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_of_any_field_breaks_an_endpoint(null, path, data):
    schema = describe()["components"]["schemas"]
    reference = describe()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = sorted(schema[reference.rpartition("/")[2]]["properties"].keys() - {"stream", "stream_options"})
    change = data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=3))
    short = {"max_tokens": 2} if "max_tokens" in fields else {}
    short |= {"max_output_tokens": 2} if "max_output_tokens" in fields else {}
    body = json.dumps(EXAMPLES[path] | short | change).encode("utf-8", "surrogatepass")
    response = send(null, path, body)
    assert response.status_code in (200, 400, 404), response.text[:300]


def connect(null) -> socket.socket:
    return socket.create_connection(("127.0.0.1", null.port), timeout=20)


def request_bytes(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


STREAM = {"prompt": "hello", "max_tokens": 2000, "stream": True}


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_clients_that_break_off_leave_nothing_behind(null, null_llm, wait_until):
    whole = request_bytes("/v1/completions", STREAM)
    for cut in range(0, len(whole), 23):
        with connect(null) as connection:
            connection.sendall(whole[:cut])
    for _ in range(10):
        connection = connect(null)
        connection.sendall(whole)
        connection.recv(100)
        reset(connection)
    half_closed = connect(null)
    half_closed.sendall(request_bytes("/v1/completions", STREAM | {"max_tokens": 3}))
    half_closed.shutdown(socket.SHUT_WR)
    with half_closed:
        while half_closed.recv(65536):
            pass
    with connect(null) as never_reads:
        never_reads.sendall(whole * 3)  # pipelined, and nobody takes the answers
        assert null.get("/health").status_code == 200
        answer = null.client.completions.create(model="null", prompt="hi", max_tokens=2)  # the others go on
        assert answer.usage.completion_tokens == 2
    wait_until(lambda: null.service.num_admitted == 0 and null_llm.stats.num_used_blocks == 0)


def test_slow_clients_do_not_hold_up_the_others(null, wait_until):
    whole = request_bytes("/v1/completions", {"prompt": "hello", "max_tokens": 3})
    connections = [connect(null) for _ in range(50)]
    stop = threading.Event()

    def trickle() -> None:
        for position in range(len(whole)):
            for connection in connections:
                connection.sendall(whole[position : position + 1])
            if stop.wait(0.001):
                return

    thread = threading.Thread(target=trickle)
    thread.start()
    for _ in range(5):
        assert null.post("/v1/completions", {"prompt": "hi", "max_tokens": 2}).status_code == 200
    thread.join()
    stop.set()
    for connection in connections:
        with connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    wait_until(lambda: null.service.num_admitted == 0)
