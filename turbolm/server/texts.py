"""Endpoints about text and the model, which generate nothing: models, tokenize, detokenize, score."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from turbolm.errors import RequestError
from turbolm.server.body import read_body
from turbolm.server.failures import JsonResponse
from turbolm.server.schema import DetokenizeBody, ScoreBody, TokenizeBody
from turbolm.server.service import Service


async def models(request: Request) -> Response:
    """The one model that is served."""
    service: Service = request.app.state.service
    return JsonResponse({"object": "list", "data": [service.describe(details=False)]})


async def model(request: Request) -> Response:
    """The model, with what every "auto" of its configuration became, and why."""
    service: Service = request.app.state.service
    service.check_model(request.path_params["model"])
    return JsonResponse(service.describe(details=True))


async def tokenize(request: Request) -> Response:
    """The token ids of a text or of a conversation."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, TokenizeBody, service.config.max_body_bytes)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    if body.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} goes with messages alone", name)
        tokens = await service.encode(body.prompt or "", body.add_special_tokens)
    else:
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
    service.check_model(body.model)
    try:
        text = service.llm.tokenizer.decode(body.tokens, skip_special=body.skip_special_tokens)
    except RequestError as error:
        raise RequestError(str(error), "tokens") from None
    return JsonResponse({"prompt": text})


async def score(request: Request) -> Response:
    """How likely the model finds a text."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, ScoreBody, service.config.max_body_bytes)
    service.check_model(body.model)
    if isinstance(body.text, str) and body.window is None:
        service.check_length(len(body.text), "text")
    tokens = await service.encode_long(body.text)
    scored = await service.watched(request, service.llm.score(tokens, window=body.window))
    found: dict[str, object] = {
        "log_likelihood": scored.log_likelihood,
        "perplexity": scored.perplexity if scored.num_scored else None,
        "num_scored": scored.num_scored,
        "num_tokens": len(tokens),
    }
    if body.return_logprobs:
        found |= {"tokens": scored.token_ids, "logprobs": scored.logprobs}
    return JsonResponse(found)
