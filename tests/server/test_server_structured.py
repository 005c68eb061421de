"""Answers that are what a request says: JSON of a schema, a choice, a tool call."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import openai
import pydantic
import pytest

from turbolm.llm import AsyncLLM
from turbolm.text import ChatTemplate

HELLO = [{"role": "user", "content": "Describe a person."}]
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
BLUNT = {"chat_template_kwargs": {"enable_thinking": False}}


def tool(name: str, *cities: str) -> dict:
    city = {"enum": list(cities)}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", "Oslo"), tool("mayor", "Rome", "Lima")]


class Person(pydantic.BaseModel):
    age: Literal[30, 31]
    color: Literal["red", "green"]


@pytest.fixture(scope="module")
def tooled(serving):
    llm = AsyncLLM("null", progress=False, max_context=2048)
    llm.chat_template = ChatTemplate(TEMPLATE)
    with serving(llm) as served:
        yield served
    asyncio.run(llm.close())


def create(served, **options):
    return served.client.chat.completions.create(model="null", messages=HELLO, **options)


def test_the_clients_parse_gives_an_object(smollm):
    completion = smollm.client.chat.completions.parse(
        model="smollm", messages=HELLO, response_format=Person, temperature=0, max_tokens=100
    )
    assert completion.choices[0].finish_reason == "stop"
    assert isinstance(completion.choices[0].message.parsed, Person)


def test_json_mode_streamed_and_whole(smollm):
    options = {"response_format": {"type": "json_object"}, "temperature": 0, "max_tokens": 300}
    whole = smollm.client.chat.completions.create(model="smollm", messages=HELLO, **options).choices[0]
    chunks = smollm.client.chat.completions.create(model="smollm", messages=HELLO, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert whole.finish_reason == "length" or isinstance(json.loads(whole.message.content), dict)


@pytest.mark.parametrize(
    ("extra", "texts"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"guided_regex": "a{3}b"}, {"aaab"}),
        ({"guided_json": {"const": 5}}, {"5"}),
        ({"guided_json": '{"const": 5}'}, {"5"}),
        ({"guided_grammar": 'root ::= "x" "y"'}, {"xy"}),
        ({"structured_outputs": {"choice": ["up"]}}, {"up"}),
        ({"structured_outputs": {"regex": "a"}}, {"a"}),
        ({"structured_outputs": {"json": {"const": 5}}}, {"5"}),
        ({"structured_outputs": {"grammar": 'start: "z"'}}, {"z"}),
    ],
)
def test_by_the_names_of_others(null, extra, texts):
    choice = create(null, extra_body=extra).choices[0]
    assert choice.message.content in texts
    assert choice.finish_reason == "stop"
    plain = null.client.completions.create(model="null", prompt="x", extra_body=extra, n=2)
    assert {choice.text for choice in plain.choices} <= texts


def test_free_text_stays_free(null):
    free = create(null, max_tokens=9, temperature=0).choices[0].message.content
    assert (
        create(null, max_tokens=9, temperature=0, response_format={"type": "text"}).choices[0].message.content == free
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "mayor"}), ({"type": "function", "function": {"name": "mayor"}}, {"mayor"})],
)
def test_a_demanded_call_is_one(tooled, stream, choice, names):
    options = {
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 1.5,
        "extra_body": BLUNT,
    }
    for seed in range(4):
        if stream:
            pieces, finish = [], None
            for chunk in create(tooled, stream=True, seed=seed, **options):
                pieces += chunk.choices[0].delta.tool_calls or []
                finish = chunk.choices[0].finish_reason or finish
                assert not chunk.choices[0].delta.content
            name, arguments = pieces[0].function.name, "".join(piece.function.arguments for piece in pieces)
        else:
            answer = create(tooled, seed=seed, **options).choices[0]
            (call,) = answer.message.tool_calls
            name, arguments, finish = call.function.name, call.function.arguments, answer.finish_reason
        assert finish == "tool_calls"
        assert name in names
        assert json.loads(arguments)["city"] in (["Oslo"] if name == "weather" else ["Rome", "Lima"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "weather, mayor"),
        ({"response_format": {"type": "json_object"}}, "with tools"),
    ],
)
def test_what_is_refused_with_tools(tooled, options, words):
    with pytest.raises(openai.BadRequestError, match=words):
        create(tooled, tools=TOOLS, **options)


def test_thoughts_may_come_before(tooled):
    options = {"max_tokens": 30, "temperature": 0, "extra_body": {"guided_choice": ["sure"]}}
    thinking = create(tooled, logit_bias={str(ord("<")): 20}, **options).choices[0]
    assert thinking.message.reasoning_content
    assert not thinking.message.content
    blunt = create(tooled, logit_bias={str(ord("<")): -100}, **options).choices[0]
    assert (blunt.message.content, blunt.finish_reason) == ("sure", "stop")
