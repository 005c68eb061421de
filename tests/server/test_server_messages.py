"""/v1/messages, through Anthropic's client."""

from __future__ import annotations

import asyncio
import json

import anthropic
import pytest

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>\n'
OPTIONS = {"model": "null", "max_tokens": 200}


def client(served, kind=anthropic.Anthropic):
    return kind(base_url=served.url, api_key="none", max_retries=0, timeout=60)


def test_an_answer_has_anthropics_form(null):
    answer = client(null).messages.create(model="null", messages=HELLO, max_tokens=8, extra_body={"temperature": 0})
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == (
        "message",
        "assistant",
        "null",
        "max_tokens",
    )
    assert [block.type for block in answer.content] == ["text"]
    assert (len(answer.content[0].text), answer.usage.output_tokens) == (8, 8)
    chat = null.client.chat.completions.create(model="null", messages=HELLO, max_tokens=8, temperature=0)
    assert answer.content[0].text == chat.choices[0].message.content
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert client(null).messages.count_tokens(model="null", messages=HELLO).input_tokens == chat.usage.prompt_tokens


def test_a_stream_is_the_answer_in_pieces(null):
    arguments = {"model": "null", "messages": HELLO, "max_tokens": 50, "extra_body": {"temperature": 0}}
    whole = client(null).messages.create(**arguments)
    with client(null).messages.stream(**arguments) as stream:
        events = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 50)
    assert events[:2] == ["message_start", "content_block_start"]
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_async_client(null):
    async def main():
        async with client(null, anthropic.AsyncAnthropic) as asked:
            arguments = {"model": "null", "messages": HELLO, "max_tokens": 20, "extra_body": {"temperature": 0}}
            async with asked.messages.stream(**arguments) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            return text, await asked.messages.create(**arguments)

    text, whole = asyncio.run(main())
    assert text == whole.content[0].text


def test_reasoning_text_and_tools_are_blocks(scripted):
    scripted.say("<think>\nIt asks.\n</think>\n\nI look.\n" + CALL % "Oslo é" + CALL % "Rome")
    arguments = OPTIONS | {"messages": HELLO, "tools": [WEATHER]}
    whole = client(scripted).messages.create(**arguments)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.stop_reason == "tool_use"
    assert (whole.content[0].thinking.strip(), whole.content[1].text) == ("It asks.", "I look.")
    assert [block.input for block in whole.content[2:]] == [{"city": "Oslo é"}, {"city": "Rome"}]
    with client(scripted).messages.stream(**arguments) as stream:
        streamed = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in streamed.content] == [
        block.model_dump(exclude={"id"}) for block in whole.content
    ]
    one = client(scripted).messages.create(**arguments, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]

    result = {"type": "tool_result", "tool_use_id": whole.content[2].id, "content": [{"type": "text", "text": "sun"}]}
    again = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    scripted.say("It is sunny.")
    answer = client(scripted).messages.create(**OPTIONS, messages=again, tools=[WEATHER], system="Be short.")
    assert answer.content[0].text == "It is sunny."
    assert answer.stop_reason == "end_turn"


def test_stop_sequences_and_thinking_switches(scripted):
    scripted.say("one two three")
    answer = client(scripted).messages.create(**OPTIONS, messages=HELLO, stop_sequences=["two"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("one ", "stop_sequence", "two")

    def count(**options):
        return client(scripted).messages.count_tokens(model="null", messages=HELLO, **options).input_tokens

    assert count(thinking={"type": "disabled"}) - count() == len("<think>\n\n</think>\n\n")
    assert count(thinking={"type": "adaptive"}) == count()


def test_arguments_that_are_no_json_are_shown_as_they_are(scripted):
    scripted.say('<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>')
    answer = scripted.post("/v1/messages", OPTIONS | {"messages": HELLO, "tools": [WEATHER]})
    assert answer.status_code == 200
    assert all(isinstance(block.get("input", {}), dict) for block in answer.json()["content"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_token": 1}, "Did you mean 'max_tokens'?"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "can't be kept"),
        ({"container": "x"}, "'container' is not served"),
        ({"speed": "fast"}, "'speed'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "goes into 'system'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "doesn't continue"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 3}]}, "string or a list"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unknown field 'messages[0].name'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{}]}]}]}, "citations"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "exceeds the context"),
        ({"messages": [{}]}, "missing"),
        ({"messages": [3]}, "should be an object"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
    ],
)
def test_refusals_have_anthropics_form(null, change, words):
    response = null.post("/v1/messages", {"messages": HELLO, "max_tokens": 2} | change)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in body["error"]["message"]


def test_errors_have_the_clients_classes(null, null_llm, serving):
    with pytest.raises(anthropic.NotFoundError, match="no model 'claude'"):
        client(null).messages.create(model="claude", messages=HELLO, max_tokens=2)
    with serving(null_llm, keys=(b"one",)) as served:
        with pytest.raises(anthropic.AuthenticationError):
            client(served).messages.create(model="null", messages=HELLO, max_tokens=2)
        response = served.post("/v1/messages", {})
    assert response.json()["error"]["type"] == "authentication_error"


def test_the_default_model_says_the_same_streamed_and_whole(smollm):
    arguments = {"model": "smollm", "messages": HELLO, "max_tokens": 30, "extra_body": {"temperature": 0}}
    whole = client(smollm).messages.create(**arguments)
    events = smollm.post("/v1/messages", {"messages": HELLO, "max_tokens": 30, "temperature": 0, "stream": True}).text
    deltas = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    text = "".join(event["delta"]["text"] for event in deltas if event["type"] == "content_block_delta")
    assert text == whole.content[0].text
