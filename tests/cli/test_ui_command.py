from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from turbolm.cli.main import main
from turbolm.cli.ui import read_users
from turbolm.errors import ConfigError


def test_users_come_from_flags_and_files(tmp_path):
    file = tmp_path / "users"
    file.write_text("# who\nada:a:b\n\nbo:c\n")
    assert read_users(["eve:x", f"@{file}"]) == {"eve": "x", "ada": "a:b", "bo": "c"}
    assert read_users([]) == {}
    file.write_text("\n")
    for bad, message in (
        (["eve"], "user:password"),
        (["eve:"], "user:password"),
        ([":x"], "user:password"),
        ([f"@{file}"], "names no users"),
        (["@/no/such/file"], "can't read the users from /no/such/file"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_users(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["null", "--api-key", "x"], "--api-key is for servers"),
        (["null", "--served-model", "x"], "--served-model is for servers"),
        (["null", "--temperature", "-1"], "temperature must be"),
        (["null", "--auth", "me"], "--auth takes user:password"),
        (["null", "--host", "no.such.host.invalid"], "can't listen on no.such.host.invalid:0"),
        (["http://127.0.0.1:9"], "can't reach a server"),
        (["http://127.0.0.1:9", "--threads", "2"], "--threads can't be used with a server"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(capsys, arguments, message):
    assert main(["ui", *arguments, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_taken_port_is_told_before_a_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["ui", "no-such-model", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("turbolm.ui.", "gradio"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui", "null"]) == 2
    assert "pip install 'turbolm[ui]'" in capsys.readouterr().err


def test_it_serves_until_it_is_told_to_end():
    command = [sys.executable, "-m", "turbolm", "ui", "null", "--port", "0", "--host", "127.0.0.1"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        line = child.stdout.readline()
        assert line.startswith("null: http://127.0.0.1:")
        assert httpx.get(line.split()[1]).status_code == 200
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=30)
    assert child.returncode == 130
    assert error == ""
