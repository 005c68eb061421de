"""/v1/chat/completions, through the official client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from turbolm.text import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_an_answer_has_openais_form(null):
    answer = null.client.chat.completions.create(model="null", messages=HELLO, max_tokens=8, temperature=0)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "null", "chatcmpl-")
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert len(choice.message.content) == 8
    assert choice.logprobs is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_is_the_answer_in_pieces(null):
    arguments = {"model": "null", "messages": HELLO, "max_completion_tokens": 50, "temperature": 0}
    whole = null.client.chat.completions.create(**arguments)
    stream = null.client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 50)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_events_are_exact(null):
    body = {"messages": HELLO, "max_tokens": 3, "stream": True}
    response = null.post("/v1/chat/completions", body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        assert "usage" not in chunk
        assert chunk["choices"][0].keys() == {"index", "delta", "logprobs", "finish_reason"}


def test_the_async_client_and_many_at_once(null):
    async def main():
        async with null.async_client as client:

            async def one(i):
                stream = await client.chat.completions.create(
                    model="null",
                    messages=[{"role": "user", "content": f"{i}"}],
                    max_tokens=20,
                    temperature=0,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i % 4) for i in range(32)))

    texts = asyncio.run(main())
    assert texts == texts[:4] * 8
    assert {len(text) for text in texts} == {20}


def test_several_answers_and_their_usage(null):
    arguments = {"model": "null", "messages": HELLO, "n": 3, "max_tokens": 9, "seed": 1, "temperature": 5.0}
    whole = null.client.chat.completions.create(**arguments)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    one = null.client.chat.completions.create(model="null", messages=HELLO, max_tokens=1)
    assert whole.usage.prompt_tokens == one.usage.prompt_tokens
    assert whole.usage.completion_tokens == 27
    texts = {0: "", 1: "", 2: ""}
    for chunk in null.client.chat.completions.create(**arguments, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [texts[i] for i in range(3)] == [choice.message.content for choice in whole.choices]


def test_logprobs(null):
    arguments = {"model": "null", "messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    content = null.client.chat.completions.create(**arguments, temperature=0).choices[0].logprobs.content
    assert len(content) == 4
    assert content[0].logprob == pytest.approx(-0.0116, abs=1e-3)
    assert [len(entry.top_logprobs) for entry in content] == [2] * 4
    assert content[0].top_logprobs[0].token == content[0].token
    assert bytes(content[0].bytes).decode() == content[0].token
    streamed = []
    for chunk in null.client.chat.completions.create(**arguments, temperature=0, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == content


def test_sampling_fields_reach_the_engine(null):
    def ask(**options):
        base = {"model": "null", "messages": HELLO, "max_tokens": 30, "temperature": 0}
        return null.client.chat.completions.create(**(base | options)).choices[0]

    plain = ask().message.content
    stop = plain[5:8]
    assert ask(stop=stop).message.content == plain[: plain.index(stop)]
    assert ask(stop=[stop, "zzzz"]).finish_reason == "stop"
    assert ask(extra_body={"stop": stop, "include_stop_str_in_output": True}).message.content.endswith(stop)
    assert ask(extra_body={"stop": stop, "min_tokens": 30}).message.content == plain
    assert ask(logit_bias={str(ord("A")): 100}).message.content == "A" * 30
    assert ask(extra_body={"bad_words": [plain[0]]}).message.content[0] != plain[0]
    assert ask(extra_body={"stop_token_ids": [ord(plain[3])]}).message.content == plain[: plain.index(plain[3])]
    assert len(set(ask(presence_penalty=2, frequency_penalty=2, temperature=8, seed=1).message.content)) > 1
    hot = {"temperature": 9.0, "seed": 7}
    assert ask(**hot).message.content == ask(**hot).message.content != plain
    assert ask(**hot, extra_body={"top_k": 1}).message.content == plain
    assert ask(**hot, extra_body={"min_p": 1.0}).message.content == plain
    assert ask(**hot, top_p=0.01).message.content == plain


def test_tool_calls_whole_and_streamed(scripted):
    scripted.say('I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo, \\"N\\" é"}}\n</tool_call>')
    arguments = {"model": "null", "messages": HELLO, "tools": [WEATHER], "tool_choice": "auto"}
    choice = scripted.client.chat.completions.create(**arguments).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": 'Oslo, "N" é'}
    text, pieces, finish = "", [], None
    for chunk in scripted.client.chat.completions.create(**arguments, stream=True):
        delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason or finish
        text += delta.content or ""
        pieces += delta.tool_calls or []
    assert (text, finish, pieces[0].function.name, pieces[0].index) == ("I look.", "tool_calls", "weather", 0)
    assert all(piece.id is None and piece.function.name is None for piece in pieces[1:])
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert pieces[0].id
    again = [*HELLO, choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    scripted.say("It is sunny.")
    answer = scripted.client.chat.completions.create(model="null", messages=again, tools=[WEATHER])
    assert answer.choices[0].message.content == "It is sunny."


def test_one_call_alone_where_parallel_calls_are_off(scripted):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>\n'
    scripted.say(call % "Oslo" + call % "Rome")
    arguments = {"model": "null", "messages": HELLO, "tools": [WEATHER]}
    both = scripted.client.chat.completions.create(**arguments).choices[0].message.tool_calls
    one = scripted.client.chat.completions.create(**arguments, parallel_tool_calls=False).choices[0].message.tool_calls
    assert [call.function.arguments for call in both[:1]] == [call.function.arguments for call in one]
    assert len(both) == 2


def test_tools_are_not_read_where_the_choice_is_none(scripted):
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    scripted.say(text)
    answer = scripted.client.chat.completions.create(model="null", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.tool_calls is None


def test_reasoning_is_a_field_of_its_own(scripted):
    scripted.say("<think>\nFirst I think.\n</think>\n\nThen I speak.")
    message = scripted.client.chat.completions.create(model="null", messages=HELLO).choices[0].message
    assert (message.reasoning_content.strip(), message.content) == ("First I think.", "Then I speak.")
    reasoning, text = "", ""
    for chunk in scripted.client.chat.completions.create(model="null", messages=HELLO, stream=True):
        reasoning += getattr(chunk.choices[0].delta, "reasoning_content", "") or ""
        text += chunk.choices[0].delta.content or ""
    assert (reasoning, text) == (message.reasoning_content, message.content)


def test_thinking_switches_reach_the_template(scripted):
    def prompt_tokens(**options):
        answer = scripted.client.chat.completions.create(model="null", messages=HELLO, max_tokens=1, **options)
        return answer.usage.prompt_tokens

    plain = prompt_tokens()
    off = prompt_tokens(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert off - plain == len("<think>\n\n</think>\n\n")
    assert prompt_tokens(reasoning_effort="none") == off
    assert prompt_tokens(reasoning_effort="high") == plain
    with pytest.raises(openai.BadRequestError, match=r"enable_thinkin.*Did you mean 'enable_thinking'"):
        prompt_tokens(extra_body={"chat_template_kwargs": {"enable_thinkin": False}})


def test_utf8_text_survives(scripted):
    scripted.say('Grüße 👩‍👩‍👧 "quoted" \\ \n\t\x01 日本')
    whole = scripted.client.chat.completions.create(model="null", messages=HELLO).choices[0].message.content
    stream = scripted.client.chat.completions.create(model="null", messages=HELLO, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole
    assert whole == 'Grüße 👩‍👩‍👧 "quoted" \\ \n\t\x01 日本'


def test_the_default_model_says_the_same_streamed_and_whole(smollm):
    arguments = {
        "model": "smollm",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Why is the sky blue?"}]}],
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = smollm.client.chat.completions.create(**arguments).choices[0].message.content
    stream = smollm.client.chat.completions.create(**arguments, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole
    assert "blue" in whole


@pytest.mark.parametrize("opening", ["", "<think>\n"], ids=["tools", "reasoning"])
def test_the_default_model_says_the_same_with_tools_and_reasoning(smollm, monkeypatch, hermes, opening):
    monkeypatch.setattr(smollm.service.llm, "chat_template", ChatTemplate(hermes + opening))
    arguments = {"model": "smollm", "messages": HELLO, "tools": [WEATHER], "max_tokens": 60, "temperature": 0}
    message = smollm.client.chat.completions.create(**arguments).choices[0].message
    reasoning, text, calls = "", "", ""
    for chunk in smollm.client.chat.completions.create(**arguments, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        text += delta.content or ""
        calls += "".join(call.function.arguments for call in delta.tool_calls or ())
    assert text == (message.content or "")
    assert reasoning == getattr(message, "reasoning_content", "")
    assert calls == "".join(call.function.arguments for call in message.tool_calls or ())
    assert bool(reasoning) == bool(opening)
