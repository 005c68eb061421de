"""Endpoints about text and the model, which generate nothing: models, tokenize, detokenize, score."""

from __future__ import annotations

import asyncio
import math

from starlette.requests import Request
from starlette.responses import Response

from turbolm.errors import RequestError
from turbolm.server.answer import finite
from turbolm.server.body import read_body
from turbolm.server.connection import while_connected
from turbolm.server.conversation import check_messages
from turbolm.server.failures import JsonResponse
from turbolm.server.schema import DetokenizeBody, ScoreBody, TokenizeBody
from turbolm.server.service import Service

_MAX_WINDOWS = 1024  # of one text to score


async def models(request: Request) -> Response:
    """The model that is served, and its adapters."""
    service: Service = request.app.state.service
    found = [service.describe(details=False, adapter=adapter) for adapter in (None, *service.llm.adapters)]
    return JsonResponse({"object": "list", "data": found})


async def model(request: Request) -> Response:
    """The model, or an adapter of it, with what every "auto" of its configuration became, and why."""
    service: Service = request.app.state.service
    adapter = service.find_model(request.path_params["model"])
    return JsonResponse(service.describe(details=True, adapter=adapter))


async def tokenize(request: Request) -> Response:
    """The token ids of a text or of a conversation."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, TokenizeBody, service.config.max_body_bytes)
    service.find_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    if body.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} goes with messages alone", name)
        tokens = await service.encode(body.prompt or "", body.add_special_tokens)
    else:
        check_messages(body.messages, service.config.max_messages, service.llm.chat_template)
        variables = service.template_variables(body.chat_template_kwargs, None)
        tools = [tool.model_dump() for tool in body.tools or ()] or None
        tokens = await asyncio.to_thread(
            service.llm.encode_chat, body.messages, tools=tools, template_variables=variables
        )
    tokenizer = service.llm.tokenizer
    found: dict[str, object] = {
        "count": len(tokens), "max_model_len": service.llm.config.max_context, "tokens": tokens
    }  # fmt: skip
    if body.return_token_strs:
        found["token_strs"] = [tokenizer.token_text(token) for token in tokens]
    return JsonResponse(found)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, DetokenizeBody, service.config.max_body_bytes)
    service.find_model(body.model)
    try:
        text = service.llm.tokenizer.decode(body.tokens, skip_special=body.skip_special_tokens)
    except RequestError as error:
        raise RequestError(str(error), "tokens") from None
    return JsonResponse({"prompt": text})


async def score(request: Request) -> Response:
    """How likely the model finds a text."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, ScoreBody, service.config.max_body_bytes)
    adapter = service.find_model(body.model)
    if isinstance(body.text, str) and body.window is None:
        service.check_length(len(body.text), "text")
    tokens = (
        body.text if isinstance(body.text, list) else await asyncio.to_thread(service.llm.tokenizer.encode, body.text)
    )
    if body.window is not None and len(tokens) > _MAX_WINDOWS * max(body.window, 1):
        raise RequestError(
            f"{len(tokens)} tokens make more than {_MAX_WINDOWS} windows of {body.window}: send less text at once",
            "window",
        )
    work = service.llm.score(tokens, window=body.window, adapter=adapter)
    scored = await while_connected(request, work, service.config.request_timeout, body.timeout)
    log_likelihood = finite(scored.log_likelihood)
    mean = -log_likelihood / max(scored.num_scored, 1)
    found: dict[str, object] = {
        "log_likelihood": log_likelihood,
        "perplexity": math.exp(mean) if scored.num_scored and mean < 700 else None,
        "num_scored": scored.num_scored,
        "num_tokens": len(tokens),
    }
    if body.return_logprobs:
        found |= {
            "tokens": scored.token_ids,
            "logprobs": [None if value is None else finite(value) for value in scored.logprobs],
        }
    return JsonResponse(found)
