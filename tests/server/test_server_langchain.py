"""LangChain's OpenAI classes drive the server."""

from __future__ import annotations

import asyncio
from typing import Literal

import pydantic
import pytest
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

PARIS = [("system", "Be brief."), ("human", "Where is Paris?")]


class Person(pydantic.BaseModel):
    """A person."""

    age: Literal[30, 31]
    color: Literal["red", "green"]


def weather(city: str) -> str:
    """The weather in a city."""
    return city


def chat_model(served, **options) -> ChatOpenAI:
    model = served.service.name
    return ChatOpenAI(base_url=f"{served.url}/v1", api_key="none", model=model, max_retries=0, timeout=60, **options)


def test_chat_whole_streamed_and_async_are_the_same(null):
    model = chat_model(null, temperature=0, max_tokens=20)
    whole = model.invoke(PARIS)
    assert len(whole.content) == 20
    assert whole.usage_metadata["output_tokens"] == 20
    assert whole.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in model.stream(PARIS)) == whole.content
    assert asyncio.run(model.ainvoke(PARIS)).content == whole.content
    assert [answer.content for answer in model.batch([PARIS, PARIS])] == [whole.content] * 2


def test_the_responses_api(null):
    answer = chat_model(null, temperature=0, max_tokens=20, use_responses_api=True).invoke(PARIS)
    assert answer.text == chat_model(null, temperature=0, max_tokens=20).invoke(PARIS).content


def test_text_completions(null):
    model = OpenAI(base_url=f"{null.url}/v1", api_key="none", model="null", max_tokens=8, temperature=0, max_retries=0)
    assert len(model.invoke("Paris is")) == 8


@pytest.mark.parametrize("streams", [False, True])
def test_tool_calls_and_reasoning(scripted, streams):
    scripted.say('<think>Oslo?</think><tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>')
    model = chat_model(scripted).bind_tools([weather])
    if streams:
        first, *rest = model.stream(PARIS)
        answer = sum(rest, first)
    else:
        answer = model.invoke(PARIS)
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    assert call["id"]
    scripted.say("It rains.")
    follow = [*PARIS, answer, {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
    assert model.invoke(follow).content == "It rains."


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output(smollm, method):
    model = chat_model(smollm, temperature=0, max_tokens=200).with_structured_output(
        Person if method == "json_schema" else None, method=method
    )
    found = model.invoke("Describe a person as JSON, with an age and a color.")
    assert isinstance(found, Person if method == "json_schema" else dict)


def test_embeddings(null):
    model = OpenAIEmbeddings(
        base_url=f"{null.url}/v1", api_key="none", model="null", check_embedding_ctx_length=False, max_retries=0
    )
    first, second = model.embed_documents(["hello", "hello there"])
    assert len(first) == len(second) > 0
    assert model.embed_query("hello") == pytest.approx(first)
