"""Answers on their way to the client: as they grow (server-sent events), or whole."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from turbolm.server.answer import Answer
from turbolm.server.exchange import Exchange, Push
from turbolm.server.failures import ApiError, JsonResponse, to_api_error, to_json
from turbolm.server.protocol import SHORTCUT, Shortcut
from turbolm.types import Usage

PING = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies pass events on at once
]


class AnswerFormat(Protocol):
    """How an API writes answers."""

    def chunk(self, choice: int, answer: Answer) -> bytes:
        """The events for what an answer has brought since its last chunk."""

    def ending(self, usage: Usage) -> bytes:
        """The events after the last chunk, which end the stream."""

    def failure(self, error: ApiError) -> bytes:
        """The events that end the stream with an error."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """All answers as one object."""


class AnswerResponse(Response):
    """Sends what an exchange brings. When the client goes away, the exchange ends."""

    def __init__(
        self, exchange: Callable[[], AbstractAsyncContextManager[Exchange]], form: AnswerFormat, streams: bool
    ) -> None:
        self._exchange = exchange
        self._form = form
        self._streams = streams
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._exchange() as exchange:
            if scope["http_version"] == "1.0":
                send = _at_once(send)
            watch = asyncio.create_task(_watch(receive, exchange))
            try:
                if self._streams:
                    await self._send_stream(exchange, scope, send)
                else:
                    await self._send_whole(exchange, scope, receive, send)
            except asyncio.CancelledError:
                if not exchange.is_gone:
                    raise
            finally:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch

    async def _send_whole(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        await exchange.finished()
        if exchange.error is not None:
            raise to_api_error(exchange.error)
        if not exchange.is_gone:
            answers = [exchange.answers[choice] for choice in sorted(exchange.answers)]
            await JsonResponse(self._form.whole(answers, exchange.usage))(scope, receive, send)

    async def _send_stream(self, exchange: Exchange, scope: Scope, send: Send) -> None:
        exchange.record.streams = True
        await exchange.news()
        if exchange.error is not None and not exchange.answers:
            raise to_api_error(exchange.error)  # nothing is sent yet, so it has a status of its own
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        chunk, push, more = self._form.chunk, self._push(scope), True
        while not exchange.is_gone:
            body = b"".join([chunk(choice, answer) for choice, answer in exchange.take().items()]) or PING
            if exchange.is_over:
                body = (b"" if body is PING else body) + self._last(exchange)
                more = False
            exchange.blocked_since = time.perf_counter()
            await send({"type": "http.response.body", "body": body, "more_body": more})
            exchange.blocked_since = 0.0
            if not more:
                return
            await exchange.news(push)

    def _push(self, scope: Scope) -> Push | None:
        """Writes an answer's events past the application's layers, where the server lets it."""
        shortcut: Shortcut | None = scope.get("extensions", {}).get(SHORTCUT)
        if shortcut is None:
            return None
        chunk, write = self._form.chunk, shortcut.write

        def push(choice: int, answer: Answer) -> bool:
            if not shortcut.is_open:
                return False
            write(chunk(choice, answer))
            return True

        return push

    def _last(self, exchange: Exchange) -> bytes:
        if exchange.error is None:
            return self._form.ending(exchange.usage)
        if exchange.record.outcome == "ok":
            exchange.record.outcome = "failed"
        return self._form.failure(to_api_error(exchange.error))


def _at_once(send: Send) -> Send:
    """HTTP/1.0 knows no chunks: its clients get a stream when it is over."""
    head: Message = {}
    pieces: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
            return
        pieces.append(message["body"])
        if not message.get("more_body"):
            body = b"".join(pieces)
            head["headers"] = [*head["headers"], (b"content-length", str(len(body)).encode())]
            await send(head)
            await send({"type": "http.response.body", "body": body})

    return collect


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Notices that the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.leave()


def error_event(error: ApiError) -> bytes:
    """OpenAI's end of a stream that failed."""
    return b"data: " + to_json(error.body) + b"\n\n" + DONE


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
