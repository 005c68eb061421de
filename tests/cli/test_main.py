from __future__ import annotations

import subprocess
import sys

import pytest

from turbolm import hub
from turbolm.cli.main import main
from turbolm.errors import CapacityError, EngineError


def test_version(capsys):
    assert main(["version"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("turbolm ")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chta"], "unknown command 'chta'. Did you mean 'chat'? See turbolm --help"),
        (["--frob"], "unknown option '--frob'. See turbolm --help"),
        (["models", "pul", "x"], "unknown command 'pul'. Did you mean 'pull'? See turbolm models --help"),
        (["models", "pull"], "parameter NAME requires an argument. See turbolm models pull --help"),
        (["models", "list", "x"], "unknown argument 'x'"),
        (["models", "pull", "smolm2-135m"], "Did you mean 'smollm2-135m'?"),
        (["chat", "--temprature", "1", "--prompt", "x"], "Did you mean --temperature? See turbolm chat --help"),
        (["chat", "--top-k", "many", "--prompt", "x"], 'unable to convert "many" into int'),
        (["chat", "--device", "gpu", "--prompt", "x"], 'Did you mean "cpu"?'),
        (["chat", "--temperature=-3", "--prompt", "x"], "temperature must be a number from 0 to 100, got -3.0"),
        (["chat", "--block-size", "5", "--prompt", "x"], "block_size is 5; allowed: 8, 16"),
        (["chat", "--prompt", " "], "the prompt is empty"),
        (["chat", "--url", "localhost", "--prompt", "x"], "give an address such as http://"),
        (
            ["chat", "--url", "http://127.0.0.1:9", "--threads", "2", "--prompt", "x"],
            "--threads can't be used with --url",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("turbolm: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CapacityError("too small"), 1, "turbolm: too small\n"),
        (EngineError("lost"), 1, "turbolm: lost\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures_have_no_traceback(capsys, monkeypatch, error, status, message):
    def fetch(*args, **options):
        raise error

    monkeypatch.setattr(hub, "fetch", fetch)
    assert main(["models", "pull", "smollm2-135m"]) == status
    assert capsys.readouterr().err == message


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m turbolm chat --help | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""


def test_light_commands_do_not_load_torch():
    code = (
        "import sys; from turbolm.cli.main import main\n"
        "for line in (['--help'], ['models'], ['version'], ['modles']): main(line)\n"
        "sys.exit('torch' in sys.modules or 'huggingface_hub.hf_api' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_one_answer_loads_no_terminal():
    """`turbolm chat --prompt` starts without the line editor, markdown and the HTTP client."""
    code = (
        "import sys; from turbolm.cli.main import main\n"
        "assert main(['chat', 'null', '--prompt', 'x', '--max-tokens', '1']) == 0\n"
        "loaded = {'prompt_toolkit', 'markdown_it', 'pygments', 'httpx'} & set(sys.modules)\n"
        "sys.exit(', '.join(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_bad_log_level_is_reported(capsys, monkeypatch, caplog):
    monkeypatch.setenv("TURBOLM_LOG", "loud")
    assert main(["version"]) == 0
    assert "TURBOLM_LOG is 'loud'; allowed: debug" in caplog.text
