"""LiteLLM drives a server: run with a Python that has litellm, which can't share turbolm's environment (it wants
openai below 3).

    turbolm serve null --port 23399 &
    python -m venv litellm-env && litellm-env/bin/pip install litellm mcp pytest
    litellm-env/bin/python -m pytest --noconftest -c /dev/null tests/server/litellm_client.py

TURBOLM_URL names a server elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os

import litellm

URL = os.environ.get("TURBOLM_URL", "http://127.0.0.1:23399")
MESSAGES = [{"role": "user", "content": "Where is Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"enum": [30, 31]}},
    "required": ["age"],
    "additionalProperties": False,
}
OPTIONS = {"model": "openai/null", "api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0, "timeout": 60}


def test_chat_whole_streamed_and_async_are_the_same():
    asked = OPTIONS | {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = litellm.completion(**asked)
    text = whole.choices[0].message.content
    assert (len(text), whole.usage.completion_tokens, whole.choices[0].finish_reason) == (20, 20, "length")
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == text


def test_structured_output():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(**OPTIONS, messages=MESSAGES, response_format=form, max_tokens=500)
    assert json.loads(answer.choices[0].message.content)["age"] in (30, 31)


def test_tools_are_refused_where_the_model_takes_none():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    try:
        litellm.completion(**OPTIONS, messages=MESSAGES, tools=tools)
    except litellm.BadRequestError as error:
        assert "takes no tools" in str(error)
    else:
        raise AssertionError("no refusal")


def test_text_completions_and_embeddings():
    named = OPTIONS | {"model": "text-completion-openai/null"}
    assert len(litellm.text_completion(**named, prompt="Paris is", max_tokens=8).choices[0].text) == 8
    found = litellm.embedding(**OPTIONS, input=["hello", "hello there"])
    assert len(found.data) == 2
    assert found.data[0]["embedding"]
