"""What can't be served gets OpenAI's error object, with the field at fault; never a 5xx, a hang or a silent change."""

from __future__ import annotations

import json
import socket

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        ({"temperature": -1}, "temperature", "from 0 to 100, got -1"),
        ({"temperature": 1e999}, "temperature", "finite number"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 10**30}, "max_tokens", "whole number"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"max_tokens": 5000}, "prompt", "exceeds the context of 2048"),
        ({"n": 200}, "n", "allows 128"),
        ({"n": 0}, "n", "from 1"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": ["x"] * 65}, "stop", "at most 64"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 1000}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs = true"),
        ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs", "top_logprobs must be"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"tool_choice": "required"}, "tool_choice", "goes with tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "goes with tools"),
        ({"tool_choice": "must"}, "tool_choice", "'required' or"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice", "'required' or"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "takes no tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "name is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is needed"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "missing"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "(a", "stream": True}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "non-empty"),
        ({"guided_json": {"not": {}}}, "guided_json", "Unimplemented"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "go with a grammar"),
        ({"store": True}, "store", "aren't stored"),
        ({"audio": {"voice": "x"}}, "audio", "not served"),
        ({"prediction": {}}, "prediction", "not served"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "no such switch"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "doesn't read"),
        ({"model": "nul"}, "model", "Did you mean 'null'?"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]", "string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "image_url"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight", "unknown field"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "prompt", "exceeds the context"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages", "at the very most"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages", "allows 4096"),
        ({"metadata": {str(i): "x" for i in range(20)}}, "metadata", "16"),
        ({"priority": 1 << 40}, "priority", "less than"),
    ],
)
def test_chat_requests_are_refused_by_the_field(null, change, param, words):
    response = httpx.post(
        f"{null.url}{CHAT}",
        content=json.dumps({"messages": HELLO, "max_tokens": 2} | change).replace("Infinity", "1e999"),
        headers={"content-type": "application/json"},
    )
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["x", [1]]}, "prompt", "list of texts"),
        ({"prompt": [300]}, "prompt", "vocabulary"),
        ({"prompt": [-1]}, "prompt", "vocabulary"),
        ({"prompt": ["x"] * 200}, "prompt", "128"),
        ({"suffix": "x"}, "suffix", "fill in"),
        ({"best_of": 3}, "best_of", "n 1"),
        ({"logprobs": 1000}, "logprobs", "logprobs must be"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
def test_completion_requests_are_refused_by_the_field(null, change, param, words):
    response = null.post("/v1/completions", {"prompt": "hello", "max_tokens": 2} | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b'{"messages": \xff\xfe}', "no valid JSON"),
        (b'{"messages": "\xff"}', "no valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "no valid JSON"),
        (b'{"n": ' + b"9" * 100_000 + b"}", ""),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"x"', "JSON object"),
        (b"{}", "'messages' is missing"),
        (b'{"messages": NaN}', ""),
    ],
)
def test_broken_bodies(null, body, words):
    response = httpx.post(f"{null.url}{CHAT}", content=body, headers={"content-type": "application/json"}, timeout=20)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert len(response.content) < 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from((
    "temperature", "n", "stop", "seed", "logit_bias", "tools", "tool_choice", "stream_options", "response_format",
    "messages", "model", "metadata", "chat_template_kwargs", "stop_token_ids", "bad_words", "top_k", "user",
))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_value_of_any_field_breaks_the_server(null, change):
    body = {"messages": HELLO, "max_tokens": 1} | change
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    response = httpx.post(f"{null.url}{CHAT}", content=data, headers={"content-type": "application/json"}, timeout=20)
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_paths_methods_and_content_types(null):
    response = null.get("/v1/chat/completion")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert "Did you mean '/v1/chat/completions'?" in response.json()["error"]["message"]
    response = null.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = httpx.post(f"{null.url}{CHAT}", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        null.client.models.retrieve("gpt")


def raw(port: int, data: bytes, finish: bool = False) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        if finish:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_bodies_beyond_the_limit(null):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert raw(null.port, head + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413")
    piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"  # a body without an end
    with socket.create_connection(("127.0.0.1", null.port), timeout=20) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(piece)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 40_000 + b"\r\n", b"431"),
        (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n", b"431"),
    ],
)
def test_broken_heads(null, data, status):
    try:
        received = raw(null.port, data)
    except ConnectionResetError:  # it hung up with our bytes unread, before we read its answer
        received = b"HTTP/1.1 " + status
    assert received.startswith(b"HTTP/1.1 " + status)
    assert null.get("/health").status_code == 200


def test_half_closed_connections_end(null):
    raw(null.port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{", finish=True)
    raw(null.port, b"", finish=True)
    assert null.get("/health").status_code == 200
