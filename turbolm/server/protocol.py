"""HTTP/1.1 with limits on what comes before a request's body (its size, and the time that it takes), and a shortcut
for streams."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from turbolm.server.failures import ApiError, to_json

HEAD_BYTES = 64 << 10
HEAD_SECONDS = 20.0
SHORTCUT = "turbolm.shortcut"  # the extension in a request's scope: a Shortcut


class Shortcut:
    """Writes further parts of a response that has begun, without a coroutine in each layer of the application."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow: FlowControl = cycle.flow
        self._write = cycle.transport.write

    @property
    def is_open(self) -> bool:
        """Whether the client takes in what it gets. If not, `send` waits for it, and knows when it has gone."""
        cycle = self._cycle
        return not (self._flow.write_paused or cycle.disconnected or cycle.response_complete) and bool(
            cycle.chunked_encoding
        )

    def write(self, body: bytes) -> None:
        if body:  # an empty chunk ends a response
            self._write(b"%x\r\n%b\r\n" % (len(body), body))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which takes any number of headers, and waits for them for ever."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self._head_bytes = HEAD_BYTES + 1
            raise httptools.HttpParserError("the head is too large")
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            scope: dict[str, Any] = cast("dict[str, Any]", cycle.scope)
            scope["extensions"] = {**scope.get("extensions", {}), SHORTCUT: Shortcut(cycle)}

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's words)
        error = ApiError(400, "this is no valid HTTP request", code="invalid_http")
        if self._head_bytes > HEAD_BYTES:
            error = ApiError(431, f"the request's headers are larger than {HEAD_BYTES} bytes", code="headers_too_large")
        body = to_json(error.body)
        head = (
            b"content-type: application/json\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._stop_timer()
        self._in_head = True
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._hang_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
