"""Fixtures that several test files share."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that runs this in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the programs under test would ignore it, too

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels run on the CPU

from turbolm.hub import fetch


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, downloaded once into turbolm's cache folder."""
    return fetch("smollm2-135m").path


MARKDOWN = (
    "# Title\n\nSome *emphasis* and `code`.\n\n- one\n- two\n\n"
    "```python\nfor i in range(3):\n    print(i)\n```\n\nThe *last* line.\n"
)


@dataclass
class ToyServer:
    """An OpenAI-compatible server whose answers depend on the question."""

    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)


def deltas(question: str):
    """(delta, pause in seconds) for a question."""
    if question == "think":
        for word in ["First", "I", "consider.", "Then", "I", "decide."]:
            yield {"reasoning_content": word + " "}, 0.01
        yield {"content": "Decided."}, 0
    elif question == "slow":
        for number in range(400):
            yield {"content": f"word{number} "}, 0.03
    elif question == "long":
        for number in range(120):
            yield {"content": f"- item {number}\n"}, 0.002
    elif question == "code":
        yield {"content": "```\n"}, 0
        for number in range(100):
            yield {"content": f"line {number}\n"}, 0.002
        yield {"content": "```\n\nDone.\n"}, 0
    elif question == "tool":
        yield {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": '{"ci'}}]}, 0
        yield {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Oslo"}'}}]}, 0
    elif question == "escape":
        yield {"content": "before\x1b[2Jafter\x07"}, 0
    elif question == "markdown":
        for start in range(0, len(MARKDOWN), 3):
            yield {"content": MARKDOWN[start : start + 3]}, 0.003
    else:
        for word in f"You said: {question}".split(" "):
            yield {"content": word + " "}, 0


class Handler(http.server.BaseHTTPRequestHandler):
    toy: ToyServer

    def do_GET(self):
        self._json(200, {"data": [{"id": "toy-model", "max_model_len": 1000}, {"id": "other"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.toy.bodies.append(body)
        self.toy.headers.append(dict(self.headers))
        question = body["messages"][-1]["content"]
        if question == "refuse":
            self._json(400, {"error": {"message": "this prompt is refused", "type": "invalid_request_error"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = 0
        try:
            for delta, pause in deltas(question):
                self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                count += 1
                if question == "break" and count > 2:
                    return
                time.sleep(pause)
            if question == "fail":
                self._event({"error": {"message": "out of order"}})
                return
            finish = "length" if question == "cut" else "stop"
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": count}})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.toy.hung_up.set()

    def _event(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def start_toy() -> tuple[ToyServer, http.server.ThreadingHTTPServer]:
    toy = ToyServer()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Toy", (Handler,), {"toy": toy}))
    toy.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return toy, server


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyServer]:
    """An OpenAI-compatible server without a model."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    toy, server = start_toy()
    yield toy
    server.shutdown()
    server.server_close()
