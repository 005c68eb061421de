"""POST /v1/embeddings"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from turbolm.embedding import Embedding
from turbolm.errors import RequestError
from turbolm.server.blocks import renamed
from turbolm.server.body import read_body
from turbolm.server.connection import while_connected
from turbolm.server.exchange import Record
from turbolm.server.failures import JsonResponse
from turbolm.server.schema import CACHE_SALT, MODEL, PRIORITY, TIMEOUT, USER, Body
from turbolm.server.service import Service
from turbolm.types import Pooling, SamplingParams

MAX_INPUTS = 2048


class EmbeddingsBody(Body):
    """POST /v1/embeddings"""

    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, several texts, token ids, or several lists of token ids; up to 2048."
    )
    model: str | None = MODEL
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the vector's float32 numbers, little-endian."
    )
    dimensions: int | None = Field(None, ge=1, description="Only so many leading ones of the model's.")
    user: str | None = USER
    pooling: Pooling | None = Field(
        None, description="The last token's hidden state, or the mean of all; by default as the model was made for."
    )
    normalize: bool | None = Field(None, description="false: vectors keep their length, which is 1 otherwise.")
    priority: int = PRIORITY
    cache_salt: str | None = CACHE_SALT
    timeout: float | None = TIMEOUT

    instead: ClassVar[dict[str, str]] = {
        "input": "give a text, a list of texts, a list of token ids, or a list of such lists"
    }


async def embeddings(request: Request) -> Response:
    """Texts as vectors."""
    service: Service = request.app.state.service
    record: Record = request.scope["record"]
    body, data = await read_body(request, EmbeddingsBody, service.config.max_body_bytes)
    record.details |= body.model_dump(include={"user"}, exclude_none=True)
    if service.config.log_prompts:
        record.details["body"] = data.decode("utf-8", "replace")
    adapter = service.find_model(body.model)
    with renamed({"prompt": "input"}):
        found = await while_connected(request, _embed_all(service, body, adapter), service.config.request_timeout)
    num_tokens = sum(embedding.num_tokens for embedding in found)
    service.note_prompts([embedding.num_tokens for embedding in found], record)
    return JsonResponse({
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _shown(embedding, body)}
            for index, embedding in enumerate(found)
        ],
        "model": adapter or service.name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    })  # fmt: skip


async def _embed_all(service: Service, body: EmbeddingsBody, adapter: str | None) -> list[Embedding]:
    """In the order of the inputs; the first that fails ends the others."""
    texts = _inputs(body)
    prompts = [await service.encode(text) for text in texts]
    params = SamplingParams(timeout=body.timeout)
    tasks = [
        asyncio.ensure_future(
            service.llm.embed(
                prompt,
                pooling=body.pooling,
                normalize=body.normalize is not False,
                dimensions=body.dimensions,
                params=params,
                adapter=adapter,
                priority=body.priority,
                tenant=body.cache_salt or "",
            )
        )
        for prompt in prompts
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _inputs(body: EmbeddingsBody) -> Sequence[str | list[int]]:
    given = body.input
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise RequestError(f"input holds {len(given)} texts; give 1 to {MAX_INPUTS}", "input")
    return cast("list[str | list[int]]", given)


def _shown(embedding: Embedding, body: EmbeddingsBody) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(embedding.vector.astype("<f4").tobytes()).decode()
    return embedding.vector.tolist()
