"""`turbolm serve`, the process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from turbolm import AsyncLLM
from turbolm.cli.main import main
from turbolm.errors import EngineError
from turbolm.server import run
from turbolm.server.config import ServerConfig
from turbolm.server.service import Service


@contextlib.contextmanager
def process(*options: str):
    command = [sys.executable, "-m", "turbolm", "serve", "null", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            head = ""
            while not (found := re.search(r"served at (http\S+)/v1", head)):
                line = server.stderr.readline()
                assert line, head
                head += line
            yield server, found[1], head
        finally:
            server.kill()


def test_sigterm_finishes_what_runs_and_exits_with_0():
    with process("--host", "0.0.0.0", "--max-context", "4096") as (server, url, head):
        assert "open to the network" in head
        assert "device cpu" in head
        body = {"prompt": "x", "max_tokens": 4000, "stream": True}
        url = url.replace("0.0.0.0", "127.0.0.1")
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(20) == 0
        logged = [json.loads(line) for line in server.stderr.read().splitlines() if line.startswith("{")]
        assert [(line["status"], line["outcome"], line["answer_tokens"]) for line in logged] == [(200, "ok", 4000)]


def test_running_requests_end_with_an_error_at_the_time_limit():
    body = {"prompt": ["x"] * 100, "max_tokens": 30000, "stream": True}
    with process("--max-context", "32768", "--drain-timeout", "0.3", "--no-isolated") as (server, url, _):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            *_, error, done = (line for line in lines if line)
        assert "shutting down" in error
        assert done == "data: [DONE]"
        assert server.wait(20) == 0


def test_a_second_signal_ends_at_once():
    body = {"prompt": ["x"] * 100, "max_tokens": 30000, "stream": True}
    with (
        process("--max-context", "32768", "--no-isolated") as (server, url, _),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(5) == 128 + signal.SIGTERM


def test_the_server_ends_when_its_engine_is_lost(null_llm, monkeypatch):
    monkeypatch.setattr(AsyncLLM, "is_given_up", True)
    monkeypatch.setattr(AsyncLLM, "trouble", "it failed 6 times in a row and is given up")
    config = ServerConfig()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(EngineError, match="6 times in a row"):
        asyncio.run(run._run(Service(null_llm, config), config, listener))


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "nothing-of-that-name", "--port", port]) == 2
    assert f"can't listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "x"], "unable to convert"),
        (["--prot", "1"], "Did you mean --port?"),
        (["--port", "99999"], "from 0 to 65535"),
        (["--api-key-file", "/nothing"], "can't read '/nothing'"),
        (["--host", "256.1.1.1"], "can't listen on 256.1.1.1"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["serve", "null", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
