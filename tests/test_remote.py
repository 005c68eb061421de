from __future__ import annotations

import asyncio

import pytest

from turbolm.errors import ConfigError, EngineError, RequestError
from turbolm.remote import RemoteLLM
from turbolm.types import Output, SamplingParams, ToolCallPart


def ask(toy, question, params=None, **options):
    async def run():
        llm = RemoteLLM(toy.url, **options)
        try:
            messages = [{"role": "user", "content": question}]
            return Output.collect([output async for output in llm.chat(messages, params)])
        finally:
            await llm.close()

    return asyncio.run(run())


def test_text_reasoning_tools_usage(toy):
    output = ask(toy, "think")
    assert (output.text, output.reasoning) == ("Decided.", "First I consider. Then I decide. ")
    assert (output.finish_reason, output.usage.total_tokens) == ("stop", 17)
    assert ask(toy, "tool").parts == (ToolCallPart(0, '{"city": "Oslo"}', "call_1", "weather"),)
    assert ask(toy, "cut").finish_reason == "length"


def test_only_what_was_changed_or_given_is_sent(toy):
    ask(toy, "hello", SamplingParams(top_k=5, stop=("a", "b"), include_stop=True))
    body = toy.bodies[-1]
    assert body.keys() == {"model", "messages", "stream", "stream_options"} | {
        "top_k",
        "stop",
        "include_stop_str_in_output",
    }
    assert body["stop"] == ["a", "b"]


def test_what_was_given_is_sent_even_if_it_is_the_default(toy):
    async def run():
        llm = RemoteLLM(toy.url)
        llm.explicit = {"temperature"}
        stream = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(), explicit={"top_p"})
        async for _ in stream:
            pass
        await llm.close()

    asyncio.run(run())
    sent = toy.bodies[-1]
    assert (sent["temperature"], sent["top_p"]) == (1.0, 1.0)
    assert "top_k" not in sent


def test_model_key_and_context(toy):
    llm = RemoteLLM(f"{toy.url}/v1/")
    assert (llm.model_name, llm.config.max_context) == ("toy-model", 1000)
    assert RemoteLLM(toy.url, "other").config.max_context == 0
    ask(toy, "hello", api_key="secret")
    assert toy.headers[-1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ("refuse", RequestError, r"refused \(400\): this prompt is refused"),
        ("break", EngineError, "without a finish_reason|broke"),
        ("fail", EngineError, "out of order"),
    ],
)
def test_failures(toy, question, error, message):
    with pytest.raises(error, match=message):
        ask(toy, question)


def test_wrong_addresses_and_names(toy):
    with pytest.raises(ConfigError, match="no model 'nothere'; it serves: toy-model, other"):
        RemoteLLM(toy.url, "nothere")
    with pytest.raises(ConfigError, match="can't reach a server"):
        RemoteLLM("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="give an address"):
        RemoteLLM("127.0.0.1:8000")


def test_closing_the_stream_hangs_up(toy):
    async def run():
        llm = RemoteLLM(toy.url)
        stream = llm.chat([{"role": "user", "content": "slow"}])
        await stream.__anext__()
        await stream.aclose()
        await llm.close()

    asyncio.run(run())
    assert toy.hung_up.wait(10)
