"""With a real model, greedy: a streamed answer is the whole one byte for byte, with tools and reasoning on, over the
chat, responses and messages APIs."""

from __future__ import annotations

import asyncio
import json

import anthropic
import pytest

from turbolm import AsyncLLM
from turbolm.text import ChatTemplate

# The model was never trained for either, and does as the conversation before did.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> "
    '<tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def shown(city: str, days: int) -> list[dict[str, str]]:
    """A question and its answer, for the model to go on like that."""
    call = json.dumps({"name": "weather", "arguments": {"city": city, "days": days}})
    answer = f"<think>\nThe city is {city} für {days} days 🌧 天気.\n</think>\n\n{city}? I ask für Sie 🌧 天気.\n"
    return [
        {"role": "user", "content": f"Weather in {city} for {days} days?"},
        {"role": "assistant", "content": f"{answer}<tool_call>\n{call}\n</tool_call>"},
    ]


QUESTION = [*shown("Oslo", 2), *shown("Lima", 5), *shown("Bern", 3), shown("Rome", 4)[0]]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": SCHEMA}}]
LENGTH = 120


@pytest.fixture(scope="module")
def thinker(smollm2_path, serving):
    llm = AsyncLLM(str(smollm2_path), progress=False, max_context=2048)
    llm.chat_template = ChatTemplate(TEMPLATE)
    with serving(llm) as served:
        yield served
    asyncio.run(llm.close())


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_chat(thinker, choice):
    arguments = {
        "model": thinker.service.name, "messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "temperature": 0,
        "max_tokens": LENGTH,
    }  # fmt: skip
    whole = thinker.client.chat.completions.create(**arguments).choices[0]
    text, reasoning, calls, reason = "", "", {}, None
    for chunk in thinker.client.chat.completions.create(**arguments, stream=True):
        choice_delta = chunk.choices[0]
        reason = choice_delta.finish_reason or reason
        text += choice_delta.delta.content or ""
        reasoning += getattr(choice_delta.delta, "reasoning_content", None) or ""
        for call in choice_delta.delta.tool_calls or ():
            entry = calls.setdefault(call.index, ["", ""])
            entry[0] += call.function.name or ""
            entry[1] += call.function.arguments or ""
    message = whole.message
    assert (text, reason) == (message.content or "", whole.finish_reason)
    assert reasoning == (getattr(message, "reasoning_content", None) or "")
    assert list(calls.values()) == [[c.function.name, c.function.arguments] for c in message.tool_calls or ()]
    assert reasoning
    assert calls
    assert choice == "required" or text
    assert reason == "tool_calls"


def test_responses(thinker):
    arguments = {
        "model": thinker.service.name, "input": QUESTION, "temperature": 0, "max_output_tokens": LENGTH,
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}],
    }  # fmt: skip
    whole = thinker.client.responses.create(**arguments)
    events = list(thinker.client.responses.create(**arguments, stream=True))
    assert plain(events[-1].response.output) == plain(whole.output)
    assert {name for name, _ in plain(whole.output)} == {"reasoning", "text", "weather"}
    for kind, content in (("output_text", "text"), ("reasoning_text", "reasoning")):
        deltas = "".join(event.delta for event in events if event.type == f"response.{kind}.delta")
        assert deltas == "".join(part for name, part in plain(whole.output) if name == content)


def plain(output) -> list[tuple[str, str]]:
    """Items without their ids."""
    found = []
    for item in output:
        if item.type == "message":
            found += [("text", part.text) for part in item.content]
        elif item.type == "reasoning":
            found += [("reasoning", part.text) for part in item.content]
        else:
            found.append((item.name, item.arguments))
    return found


def test_messages(thinker):
    client = anthropic.Anthropic(base_url=thinker.url, api_key="none", max_retries=0, timeout=60)
    arguments = {
        "model": thinker.service.name, "messages": QUESTION, "extra_body": {"temperature": 0}, "max_tokens": LENGTH,
        "tools": [{"name": "weather", "description": "The weather", "input_schema": SCHEMA}],
    }  # fmt: skip
    whole = client.messages.create(**arguments)
    with client.messages.stream(**arguments) as stream:
        last = stream.get_final_message()
    assert blocks(last) == blocks(whole)
    assert [block["type"] for block in blocks(whole)] == ["thinking", "text", "tool_use"]
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def blocks(message) -> list[dict]:
    return [block.model_dump(exclude={"id"}) for block in message.content]
