"""Two turns of a stored conversation with OpenAI's client (pip install openai). Start the server first:
turbolm serve --store responses.db"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("TURBOLM_URL", "http://127.0.0.1:23333") + "/v1",
    api_key=os.environ.get("TURBOLM_KEY", "none"),
)
model = client.models.list().data[0].id
first = client.responses.create(model=model, input="Name a river in Europe.", max_output_tokens=100)
sys.stdout.write(f"{first.output_text}\n")
events = client.responses.create(
    model=model,
    input="Through which cities does it flow?",
    previous_response_id=first.id,
    max_output_tokens=200,
    stream=True,
)
for event in events:
    if event.type == "response.output_text.delta":
        sys.stdout.write(event.delta)
        sys.stdout.flush()
sys.stdout.write("\n")
