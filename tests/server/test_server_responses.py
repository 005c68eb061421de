"""/v1/responses, through the official client."""

from __future__ import annotations

import asyncio
import stat

import openai
import pytest

from turbolm.errors import ConfigError
from turbolm.server.config import ServerConfig
from turbolm.server.store import ResponseStore, StoredResponse

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>\n'
SHORT = {"model": "null", "input": "hello", "max_output_tokens": 8, "temperature": 0}


def test_a_response_has_openais_form(null):
    response = null.client.responses.create(**SHORT, instructions="Be short.", metadata={"a": "b"})
    assert (response.object, response.model, response.id[:5]) == ("response", "null", "resp_")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert len(response.output_text) == response.usage.output_tokens == 8
    assert (response.instructions, response.metadata, response.max_output_tokens) == ("Be short.", {"a": "b"}, 8)
    assert response.store is False
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    chat = null.client.chat.completions.create(model="null", messages=messages, max_tokens=8, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens


def plain(response):
    """What doesn't differ from one request to the next."""
    exclude = {"id", "created_at", "completed_at", "parsed", "parsed_arguments", "call_id"}

    def strip(value):
        if isinstance(value, dict):
            return {name: strip(entry) for name, entry in value.items() if name not in exclude}
        return [strip(entry) for entry in value] if isinstance(value, list) else value

    return strip(response.to_dict())


def test_events_build_the_response(scripted):
    scripted.say("<think>\nIt asks.\n</think>\n\nI look.\n" + CALL % "Oslo é" + CALL % "Rome")
    arguments = {"model": "null", "input": "hello", "tools": [WEATHER]}
    whole = scripted.client.responses.create(**arguments)
    kinds = [item.type for item in whole.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].content[0].text.strip() == "It asks."
    assert (whole.output_text, whole.output[3].arguments) == ("I look.", '{"city": "Rome"}')
    with scripted.client.responses.stream(**arguments) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == [
        "response.created", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip
    assert events[-1].type == "response.completed"
    usage = {"usage": plain(whole)["usage"]}  # the second prompt was cached
    assert plain(final) | usage == plain(whole)
    grown = dict.fromkeys(range(len(kinds)), "")
    for event in events:
        if event.type.endswith(".delta"):
            grown[event.output_index] += event.delta
    done = [event.item for event in events if event.type == "response.output_item.done"]
    texts = [item.arguments if item.type == "function_call" else item.content[0].text for item in done]
    assert list(grown.values()) == texts
    one = scripted.client.responses.create(**arguments, parallel_tool_calls=False)
    assert [item.type for item in one.output] == kinds[:3]


def test_output_goes_back_in(scripted):
    scripted.say("<think>\nIt asks.\n</think>\n\nI look.\n" + CALL % "Oslo")
    first = scripted.client.responses.create(model="null", input="hello", tools=[WEATHER])
    call = first.output[2]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history = [{"role": "user", "content": "hello"}, *first.output, result]
    scripted.say("It is sunny.")
    assert scripted.client.responses.create(model="null", input=history, tools=[WEATHER]).output_text == "It is sunny."


def test_the_async_client(null):
    async def main():
        async with null.async_client as asked:
            stream = await asked.responses.create(**SHORT, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(main()) == null.client.responses.create(**SHORT).output_text


def test_stored_responses_go_on(null_llm, serving, tmp_path):
    path = tmp_path / "responses.db"
    with serving(null_llm, ServerConfig(store=str(path))) as served:
        asked = served.client.responses
        first = asked.create(**SHORT)
        assert first.store is True
        assert asked.retrieve(first.id).output_text == first.output_text
        items = asked.input_items.list(first.id).data
        assert [(item.role, item.content[0].text) for item in items] == [("user", "hello")]
        second = asked.create(**SHORT | {"input": "and?"}, previous_response_id=first.id)
        history = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "and?"},
        ]
        whole = asked.create(**SHORT | {"input": history}, store=False)
        assert second.usage.input_tokens == whole.usage.input_tokens
        assert second.previous_response_id == first.id
        with pytest.raises(openai.NotFoundError):
            asked.retrieve(whole.id)
        last = list(asked.create(**SHORT, stream=True))[-1].response
        assert asked.retrieve(last.id).output_text == last.output_text
        asked.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            asked.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="no response 'resp_0'"):
            asked.create(**SHORT, previous_response_id="resp_0")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with serving(null_llm, ServerConfig(store=str(path))) as served:  # after a restart
        assert served.client.responses.retrieve(second.id).output_text == second.output_text


def test_what_is_kept_is_found_at_once(tmp_path):
    store = ResponseStore(tmp_path / "kept.db")
    stored = StoredResponse({"id": "é"}, [{"a": 1}], [])
    store.keep("x", stored)
    assert asyncio.run(store.find("x")) == stored
    assert asyncio.run(store.delete("x"))
    assert not asyncio.run(store.delete("x"))
    store.close()


def test_a_store_that_is_none_is_refused(tmp_path):
    path = tmp_path / "text"
    path.write_text("This is no database. " * 200)
    with pytest.raises(ConfigError, match="store: can't use"):
        ResponseStore(path)
    with pytest.raises(ConfigError, match="store: can't use"):
        ResponseStore(tmp_path / "none" / "x.db")


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"store": True}, "store", "--store FILE"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps none"),
        ({"background": True}, "background", "while the client waits"),
        ({"include": ["web_search_call.results"]}, "include", "leave it out"),
        ({"truncation": "auto"}, "truncation", "shorten"),
        ({"conversation": "c"}, "conversation", "not served"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1"),
        ({"max_output_tokens": 5000}, "input", "exceeds the context"),
        ({"temperature": -1}, "temperature", "from 0 to 100"),
        ({"input": []}, "input", "empty"),
        ({"input": [3]}, "input", "list of items"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "served: message"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "developer"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_text"),
        ({"input": [{"type": "reasoning", "summary": [{}]}]}, "input[0]", "summary"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "not served"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "no such switch"),
        ({"inputs": "x"}, "inputs", "Did you mean 'input'?"),
        ({"stream_options": {}}, "stream_options", "stream = true"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not served"),
    ],
)
def test_refusals_name_the_field(null, change, param, words):
    response = null.post("/v1/responses", {"input": "hello", "max_output_tokens": 2} | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_the_default_model_says_the_same_streamed_and_whole(smollm):
    arguments = {"model": "smollm", "input": "Why is the sky blue?", "max_output_tokens": 30, "temperature": 0}
    whole = smollm.client.responses.create(**arguments)
    stream = smollm.client.responses.create(**arguments, stream=True)
    assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == whole.output_text
