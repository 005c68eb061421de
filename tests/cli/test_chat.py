"""`turbolm chat` as a program: in pipes, on a dumb terminal, and on a real one (a pty)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pexpect
import pytest

COMMAND = [sys.executable, "-m", "turbolm", "chat"]


def pipe(toy, *arguments, text=None):
    result = subprocess.run(
        [*COMMAND, "--url", toy.url, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return result.returncode, result.stdout, result.stderr


def test_piped_question(toy):
    status, out, err = pipe(toy, "--system", "Be brief.", "--temperature", "0", text="Why is the sky blue?\n")
    assert (status, out) == (0, "You said: Why is the sky blue? \n")
    assert re.fullmatch(r"7 tokens, .* tokens/s, first token .* s, context 17 of 1000\n", err)
    assert [message["role"] for message in toy.bodies[-1]["messages"]] == ["system", "user"]
    assert toy.bodies[-1]["temperature"] == 0


def test_prompt_flag_and_reasoning_aside(toy):
    status, out, err = pipe(toy, "other", "--prompt", "think", text="not read")
    assert (status, out) == (0, "Decided.\n")
    assert err.startswith("First I consider.")
    assert toy.bodies[-1]["model"] == "other"


def test_json_schema_from_a_file_or_in_place(toy, tmp_path):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    for given in (str(path), json.dumps(schema)):
        assert pipe(toy, "--json-schema", given, "--prompt", "Hi")[0] == 0
        sent = toy.bodies[-1]["response_format"]
        assert (sent["type"], sent["json_schema"]["schema"]) == ("json_schema", schema)


def test_schemas_that_cannot_be_read(toy, tmp_path):
    for given in (str(tmp_path / "missing.json"), "{not json", "[1]"):
        status, out, err = pipe(toy, "--json-schema", given, "--prompt", "Hi")
        assert (status, out) == (2, "") and err.startswith("turbolm: json_schema: ")


def test_markdown_goes_through_a_pipe_unchanged(toy):
    _, out, _ = pipe(toy, "--prompt", "markdown")
    assert out.startswith("# Title\n\nSome *emphasis* and `code`.")
    assert "\x1b" not in out


def test_failures_of_the_server(toy):
    assert pipe(toy, "--prompt", "refuse") == (2, "", "turbolm: the server refused (400): this prompt is refused\n")
    status, out, err = pipe(toy, "--prompt", "fail")
    assert (status, out) == (1, "You said: fail \n")
    assert err == "turbolm: the server failed: out of order\n"


def test_a_closed_pipe_ends_quietly(toy):
    command = f"{' '.join(COMMAND)} --url {toy.url} --prompt slow | head -c 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.endswith("141\n")
    assert result.stderr == ""
    assert toy.hung_up.wait(10)


@pytest.fixture
def start(toy, tmp_path):
    """Starts an interactive chat on a pty of 80 by 24."""
    processes = []

    def run(term="xterm-256color", position_reports=False):
        environment = {**os.environ, "TURBOLM_CACHE": str(tmp_path), "TERM": term}
        if not position_reports:
            environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
        process = pexpect.spawn(
            COMMAND[0], [*COMMAND[1:], "--url", toy.url], env=environment, encoding="utf-8", timeout=20,
            dimensions=(24, 80),
        )  # fmt: skip
        processes.append(process)
        process.expect("ctrl-D leaves")
        if not position_reports:
            process.expect("› ")
        return process

    yield run
    for process in processes:
        process.close(force=True)


def test_conversation(start, toy, tmp_path):
    process = start()
    process.send("hello\r")
    process.expect("You said: hello")
    process.send("two\x1b\rlines\r")  # Alt-Enter begins a new line
    process.expect("You said: two")
    process.send("\x1b[200~pasted\rtext\x1b[201~\r")
    process.expect("You said: pasted")
    process.send("/parms\r")
    process.expect("Did you mean '/params'")
    process.send(f"/save {tmp_path / 'talk.json'}\r")
    process.expect("saved 6 messages")
    process.send("dropped\x03")  # ctrl-C at the prompt
    process.send("refuse\r")
    process.expect("this prompt is refused")
    process.send("/exit\r")
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0
    asked = [message["content"] for message in toy.bodies[-1]["messages"] if message["role"] == "user"]
    assert asked == ["hello", "two\nlines", "pasted\ntext", "refuse"]
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][1] == {"role": "assistant", "content": "You said: hello "}
    assert "hello" in (tmp_path / "chat_history").read_text()
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(start, toy):
    process = start()
    process.send("slow\r")
    process.expect("word5")
    process.sendintr()
    process.expect("stopped")
    assert toy.hung_up.wait(10)
    process.send("again\r")
    process.expect("You said: again")
    partial = toy.bodies[-1]["messages"][1]
    assert partial["role"] == "assistant"
    assert partial["content"].startswith("word0 word1")
    process.expect("› ")
    process.sendeof()
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0


def test_status_line(start):
    process = start(position_reports=True)
    for toolbar in ("toy-model · context of 1000 tokens", r"toy-model · 3 tokens, .* tokens/s, .*context 13 of 1000"):
        process.expect_exact("\x1b[6n")  # where is the cursor?
        process.send("\x1b[3;1R")
        process.expect(toolbar)
        process.send("hello\r")


def test_dumb_terminal(start):
    process = start("dumb")
    process.send("markdown\r")
    process.expect("# Title")
    process.expect(r"The \*last\* line\.")
    assert "\x1b" not in process.before
    process.send("/exit\r")
    process.expect(pexpect.EOF)
