"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, over the chat API."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from turbolm.server.answer import Answer
from turbolm.server.blocks import renamed
from turbolm.server.body import build, read_body
from turbolm.server.chat import chat_tools, submit
from turbolm.server.exchange import Record
from turbolm.server.failures import ApiError, JsonResponse, to_json
from turbolm.server.items import Change, Item, Items
from turbolm.server.messages_schema import CountTokensBody, MessagesBody
from turbolm.server.schema import ChatBody
from turbolm.server.service import Service
from turbolm.server.stream import AnswerResponse
from turbolm.text.parser import choose_reasoning_format
from turbolm.types import Output, Usage

_NAMES = {"stop": "stop_sequences", "prompt": "messages", "reasoning_effort": "thinking",
          "response_format": "output_config"}  # fmt: skip
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessagesFormat:
    """Anthropic's message objects and events."""

    def __init__(self, model: str, num_prompt_tokens: int, *, one_call: bool) -> None:
        """`one_call`: further tool calls are left out."""
        self._identity = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._items = Items(one_call=one_call)
        self._has_begun = False
        self._final: Output | None = None

    def chunk(self, _: int, answer: Answer) -> bytes:
        events = b""
        if not self._has_begun:
            self._has_begun = True
            started = self._message([], None, _usage(Usage(self._num_prompt_tokens, 0)))
            events = _event({"type": "message_start", "message": started})
        events += self._events(self._items.take(answer.parts))
        if answer.final is not None:
            self._final = answer.final
            events += self._events(self._items.finish())
        return events

    def ending(self, usage: Usage) -> bytes:
        delta = {"type": "message_delta", "delta": _stop(self._final), "usage": _usage(usage)}
        return _event(delta) + _event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return _event(error.anthropic_body)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        answer = answers[0]
        blocks = [_block(item, item.text) for item in self._items.collect(answer.parts)]
        return self._message(blocks, answer.final, _usage(usage))

    def _message(self, blocks: list[dict[str, Any]], final: Output | None, usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._identity,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            **_stop(final),
            "usage": usage,
        }

    def _events(self, changes: Iterable[tuple[Change, Item, str]]) -> bytes:
        events = []
        for change, item, text in changes:
            body: dict[str, Any] = {"type": f"content_block_{_CHANGES[change]}", "index": item.index}
            if change == "begin":
                body["content_block"] = _block(item, "")
            elif change == "grow":
                kind, name = _DELTAS[item.kind]
                body["delta"] = {"type": kind, name: text}
            events.append(_event(body))
        return b"".join(events)


_CHANGES = {"begin": "start", "grow": "delta", "end": "stop"}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _block(item: Item, text: str) -> dict[str, Any]:
    if item.kind == "text":
        return {"type": "text", "text": text}
    if item.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "tool_use", "id": f"toolu_{item.id}", "name": item.name, "input": _arguments(text)}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call, an object. What the model wrote is shown where it isn't one: streams send it too."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"invalid_json": text}
    return value if isinstance(value, dict) else {"invalid_json": text}


def _stop(final: Output | None) -> dict[str, str | None]:
    if final is None:
        return {"stop_reason": None, "stop_sequence": None}
    if isinstance(final.stop, str) and final.finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": final.stop}
    return {"stop_reason": _REASONS.get(final.finish_reason or "", "end_turn"), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(body: dict[str, Any]) -> bytes:
    return f"event: {body['type']}\ndata: ".encode() + to_json(body) + b"\n\n"


async def messages(request: Request) -> Response:
    """Answers a conversation."""
    service: Service = request.app.state.service
    record: Record = request.scope["record"]
    body, data = await read_body(request, MessagesBody, service.config.max_body_bytes)
    if body.metadata is not None and body.metadata.user_id is not None:
        record.details["user"] = body.metadata.user_id
    if service.config.log_prompts:
        record.details["body"] = data.decode("utf-8", "replace")
    adapter = service.find_model(body.model)
    with renamed(_NAMES):
        chat = _chat_body(body, service)
        source, num_answers = await submit(service, chat, adapter)
    form = MessagesFormat(adapter or service.name, source.num_prompt_tokens, one_call=chat.parallel_tool_calls is False)
    return AnswerResponse(partial(service.exchange, [source], num_answers, record), form, bool(body.stream))


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has, as the model sees it."""
    service: Service = request.app.state.service
    body, _ = await read_body(request, CountTokensBody, service.config.max_body_bytes)
    service.find_model(body.model)
    with renamed(_NAMES):
        chat = _chat_body(body, service)
        service.check_length(sum(len(str(message["content"])) for message in chat.messages), "messages")
        encode = partial(
            service.llm.encode_chat,
            chat.messages,
            tools=chat_tools(chat, service),
            template_variables=service.template_variables(chat.chat_template_kwargs, chat.reasoning_effort),
        )
        return JsonResponse({"input_tokens": len(await asyncio.to_thread(encode))})


def _chat_body(body: CountTokensBody, service: Service) -> ChatBody:
    template = service.llm.chat_template
    reasons = template is not None and choose_reasoning_format(template.source) is not None
    return build(body.chat_fields(reasons=reasons), ChatBody)
