"""The web application around the page: who may see it, what it may load, where it listens."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import socket
import sys
from collections.abc import AsyncIterator, Mapping

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbolm.errors import ConfigError
from turbolm.ui.chat import Chat
from turbolm.ui.page import build_page

_log = logging.getLogger("turbolm.ui")
_MAX_BODY = 16 << 20  # bytes of one request: the longest conversation
_GRACE = 2  # seconds for open pages when the server ends
# A page never loads anything from elsewhere: no fonts, and no picture that a model's markdown names, whose
# address could carry the conversation away. Gradio's own page needs inline scripts and styles.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """Refuses uploads and endless bodies, and sends the policy with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, send_guarded)


def _refusal(scope: Scope) -> PlainTextResponse | None:
    if scope["method"] != "POST":
        return None
    if "/upload" in scope["path"]:
        return PlainTextResponse("this page takes no files", 403)
    length = Headers(scope=scope).get("content-length", "")
    if not length.isdigit():
        return PlainTextResponse("a body needs a Content-Length", 411)
    if int(length) > _MAX_BODY:
        return PlainTextResponse(f"the conversation is longer than {_MAX_BODY} bytes", 413)
    return None


def create_app(chat: Chat, *, users: Mapping[str, str] | None = None, system: str = "") -> FastAPI:
    """The ASGI application; closes the engine when it ends. `users`: name → password; None lets everybody in."""

    def knows(name: str, password: str) -> bool:
        expected = (users or {}).get(name)
        same = hmac.compare_digest((expected or "").encode(), password.encode())
        return same and expected is not None

    @contextlib.asynccontextmanager
    async def closing_engine(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await chat.engine.close()

    app = FastAPI(lifespan=closing_engine, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    gr.mount_gradio_app(
        app, build_page(chat, system), path="/", auth=knows if users else None, show_error=False, footer_links=[],
        run_history=False, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, max_file_size=1,
    )  # fmt: skip
    return app


def listen(host: str, port: int) -> socket.socket:
    """Takes the port. ConfigError where that can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't listen on {host}:{port} ({error}): give an address of this machine") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"can't listen on {host}:{port} ({error}): choose another --port or --host") from None
    return listener


def serve(app: FastAPI, listener: socket.socket, *, model: str, is_guarded: bool) -> None:
    """Serves until SIGINT or SIGTERM."""
    host, port = listener.getsockname()[:2]
    if not is_guarded and not ipaddress.ip_address(host).is_loopback:
        sys.stderr.write(
            f"turbolm: anybody who reaches {host} can use this page; --auth user:password asks who it is\n"
        )
    sys.stdout.write(f"{model}: http://{f'[{host}]' if ':' in host else host}:{port} (ctrl-C ends)\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
