"""/v1/responses: OpenAI's newer API, over the chat API."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from turbolm.errors import RequestError
from turbolm.server.blocks import renamed
from turbolm.server.body import build, read_body
from turbolm.server.chat import submit
from turbolm.server.exchange import Record
from turbolm.server.failures import ApiError, JsonResponse
from turbolm.server.items import Item
from turbolm.server.responses_format import ResponsesFormat, call_id
from turbolm.server.responses_schema import ResponsesBody
from turbolm.server.schema import ChatBody
from turbolm.server.service import Service
from turbolm.server.store import ResponseStore, StoredResponse
from turbolm.server.stream import AnswerResponse

_NAMES = {"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens",
          "max_completion_tokens": "max_output_tokens", "response_format": "text",
          "reasoning_effort": "reasoning"}  # fmt: skip


async def respond(request: Request) -> Response:
    """Answers a text or a conversation."""
    service: Service = request.app.state.service
    record: Record = request.scope["record"]
    body, data = await read_body(request, ResponsesBody, service.config.max_body_bytes)
    record.details |= body.model_dump(include={"user", "metadata", "safety_identifier"}, exclude_none=True)
    if service.config.log_prompts:
        record.details["body"] = data.decode("utf-8", "replace")
    adapter = service.find_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options goes with stream = true alone", "stream_options")
    messages = [*await _before(body, service), *body.messages()]
    store = _store(body, service)
    with renamed(_NAMES):
        chat = build(body.chat_fields(messages), ChatBody)
        source, num_answers = await submit(service, chat, adapter)
    keep = None if store is None else partial(_keep, store, body, messages)
    form = ResponsesFormat(body, adapter or service.name, keep)
    return AnswerResponse(partial(service.exchange, [source], num_answers, record), form, bool(body.stream))


async def stored_response(request: Request) -> Response:
    """GET: a stored response. DELETE: forgets it."""
    service: Service = request.app.state.service
    identity = request.path_params["response"]
    if request.method == "DELETE":
        if service.store is None or not await service.store.delete(identity):
            raise _unknown(identity, service, "response")
        return JsonResponse({"id": identity, "object": "response", "deleted": True})
    if request.query_params:
        name = next(iter(request.query_params))
        raise RequestError(f"the parameter '{name[:80]}' is not served: leave it out", name[:80])
    return JsonResponse((await _find(identity, service, "response")).response)


async def input_items(request: Request) -> Response:
    """What a stored response answered to."""
    service: Service = request.app.state.service
    identity = request.path_params["response"]
    found = (await _find(identity, service, "response")).input
    items = [{"id": f"in_{number}", **item} for number, item in enumerate(found)][::-1]  # the latest first
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return JsonResponse({"object": "list", "data": items, "has_more": False, "first_id": first, "last_id": last})


def _store(body: ResponsesBody, service: Service) -> ResponseStore | None:
    if body.store and service.store is None:
        raise RequestError("store can't be true: the server keeps no responses (turbolm serve --store FILE)", "store")
    return None if body.store is False else service.store


async def _before(body: ResponsesBody, service: Service) -> list[dict[str, Any]]:
    if body.previous_response_id is None:
        return []
    return (await _find(body.previous_response_id, service, "previous_response_id")).messages


async def _find(identity: str, service: Service, parameter: str) -> StoredResponse:
    stored = await service.store.find(identity) if service.store is not None else None
    if stored is None:
        raise _unknown(identity, service, parameter)
    return stored


def _unknown(identity: str, service: Service, parameter: str) -> ApiError:
    why = "" if service.store is not None else ": the server keeps none (turbolm serve --store FILE)"
    status = 400 if parameter == "previous_response_id" else 404
    return ApiError(status, f"no response '{identity[:80]}'{why}", parameter=parameter, code="response_not_found")


def _keep(
    store: ResponseStore,
    body: ResponsesBody,
    messages: Sequence[dict[str, Any]],
    response: dict[str, Any],
    items: Sequence[Item],
) -> None:
    text = "".join(item.text for item in items if item.kind == "text")
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if reasoning := "".join(item.text for item in items if item.kind == "reasoning"):
        message["reasoning_content"] = reasoning
    calls = [
        {"id": call_id(item), "type": "function", "function": {"name": item.name, "arguments": item.text}}
        for item in items
        if item.kind == "call"
    ]
    if calls:
        message["tool_calls"] = calls
    store.keep(response["id"], StoredResponse(response, body.input_items(), [*messages, message]))
