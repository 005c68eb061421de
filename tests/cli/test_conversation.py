from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.cli.conversation import Conversation
from turbolm.errors import RequestError, TurbolmError, UserError
from turbolm.types import SamplingParams


def conversation(**given):
    return Conversation(SamplingParams(temperature=0.3, top_p=0.8), given, "Be brief.")


def test_given_parameters_change_the_recommended_ones():
    params = conversation(top_p=0.5).params
    assert (params.temperature, params.top_p) == (0.3, 0.5)


def test_messages_begin_with_the_system_prompt():
    talk = conversation()
    talk.ask("Hi")
    talk.keep("Hello")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.reset()
    talk.system = None
    assert talk.messages == []


def test_a_question_without_an_answer_is_forgotten():
    talk = conversation()
    talk.ask("Hi")
    talk.keep("")
    assert talk.turns == []


def test_set_params():
    talk = conversation()
    seen_by_others = talk.given
    talk.set_params(["temperature=0", "stop=END", "max-tokens=5", "ignore_eos=true"])
    params = talk.params
    assert (params.temperature, params.stop, params.max_tokens, params.ignore_eos) == (0, ("END",), 5, True)
    talk.set_params(['stop=["a", "b"]', "max_tokens=none"])
    assert (talk.params.stop, talk.params.max_tokens, talk.params.temperature) == (("a", "b"), None, 0)
    assert set(seen_by_others) == {"temperature", "stop", "max_tokens", "ignore_eos"}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["temprature=1"], "Did you mean 'temperature'"),
        (["temperature"], "isn't name=value"),
        (["temperature=hot"], "must be a number"),
        (["top_p=0.5", "top_k=-1"], "top_k must be"),
        (["n=3"], "unknown parameter 'n'"),
    ],
)
def test_bad_params_change_nothing(assignments, message):
    talk = conversation()
    before = talk.params
    with pytest.raises(RequestError, match=message):
        talk.set_params(assignments)
    assert talk.params == before


def test_save_and_load(tmp_path):
    talk = conversation(seed=7, stop=("x",))
    talk.ask("Grüße 🌍")
    talk.keep("Hello")
    talk.save(tmp_path / "talk.json")
    other = Conversation(SamplingParams(), {})
    other.load(tmp_path / "talk.json")
    assert other.messages == talk.messages
    assert (other.params.seed, other.params.stop) == (7, ("x",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"messages": 3}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "robot", "content": ""}]}',
        '{"messages": [], "params": {"x": 1}}',
        '{"messages": [], "params": []}',
    ],
)
def test_other_files_are_refused_and_change_nothing(tmp_path, text):
    (tmp_path / "file").write_text(text)
    talk = conversation()
    talk.ask("Hi")
    before = json.dumps(talk.messages)
    with pytest.raises(UserError):
        talk.load(tmp_path / "file")
    assert json.dumps(talk.messages) == before


def test_paths_that_do_not_work(tmp_path):
    with pytest.raises(UserError, match="can't read"):
        conversation().load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="can't write"):
        conversation().save(tmp_path)


@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_assignment_is_taken_or_refused(assignments):
    with contextlib.suppress(TurbolmError):
        conversation().set_params(assignments)
