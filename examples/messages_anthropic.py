"""A tool call with Anthropic's client (pip install anthropic). Start the server first: turbolm serve"""

from __future__ import annotations

import os
import sys

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("TURBOLM_URL", "http://127.0.0.1:23333"),
    api_key=os.environ.get("TURBOLM_KEY", "none"),
)
weather = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
model = client.models.list().data[0].id
with client.messages.stream(
    model=model,
    max_tokens=200,
    tools=[weather],
    messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
) as stream:
    for text in stream.text_stream:
        sys.stdout.write(text)
        sys.stdout.flush()
    for block in stream.get_final_message().content:
        if block.type == "tool_use":
            sys.stdout.write(f"\n{block.name}({block.input})\n")
