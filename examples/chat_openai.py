"""A streamed answer with OpenAI's client (pip install openai). Start the server first: turbolm serve"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("TURBOLM_URL", "http://127.0.0.1:23333") + "/v1",
    api_key=os.environ.get("TURBOLM_KEY", "none"),
)
model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_tokens=100,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"min_p": 0.05},  # what OpenAI's API doesn't have
)
for chunk in stream:
    if chunk.choices:
        sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.flush()
    elif chunk.usage:
        sys.stdout.write(f"\n{chunk.usage.completion_tokens} tokens\n")
