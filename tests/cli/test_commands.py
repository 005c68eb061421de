from __future__ import annotations

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from turbolm.cli.commands import COMMANDS, CommandCompleter, run_command
from turbolm.cli.conversation import Conversation
from turbolm.errors import UserError
from turbolm.types import SamplingParams


@pytest.fixture
def talk():
    talk = Conversation(SamplingParams(), {})
    talk.ask("Hi")
    talk.keep("Hello")
    return talk


def run(line, talk):
    said = []
    run_command(line, talk, said.append)
    return "\n".join(said)


def test_help_names_every_command(talk):
    text = run("/help", talk)
    assert all(name in text for name in COMMANDS)


def test_reset_system_params_reasoning(talk):
    assert run("/system Be brief.", talk) == "system prompt: Be brief."
    assert talk.messages[0] == {"role": "system", "content": "Be brief."}
    assert "same system prompt" in run("/reset", talk)
    assert len(talk.messages) == 1
    assert run("/system none", talk) == "system prompt: none"
    assert "temperature=0.5" in run("/params temperature=0.5 top_k=3", talk)
    assert talk.params.top_k == 3
    assert "no reasoning" in run("/reasoning", talk)


def test_save_and_load_paths_with_spaces(talk, tmp_path):
    path = tmp_path / "my talk.json"
    assert "saved 2 messages" in run(f"/save {path}", talk)
    run("/reset", talk)
    assert "loaded 2 messages" in run(f"/load {path}", talk)
    assert talk.turns[1]["content"] == "Hello"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "unknown command /rest. Did you mean '/reset'"),
        ("/save", "name a file: /save FILE"),
        ("/load", "name a file"),
        ("/params 'x", "can't read the parameters"),
    ],
)
def test_mistakes(talk, line, message):
    with pytest.raises(UserError, match=message):
        run(line, talk)


def test_exit(talk):
    with pytest.raises(EOFError):
        run("/exit", talk)


def completions(text):
    return [c.text for c in CommandCompleter().get_completions(Document(text), CompleteEvent())]


def test_completion(tmp_path):
    assert completions("/re") == ["/reset", "/reasoning"]
    assert completions("/params temp") == ["temperature="]
    assert completions("/params top_k=1 min_p") == ["min_p="]
    assert completions("re") == []
    assert completions("a\n/re") == []
    (tmp_path / "talk.json").touch()
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]
