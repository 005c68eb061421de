"""The ASGI application: which path leads where."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from turbolm import __version__
from turbolm.errors import TurbolmError, nearest
from turbolm.server import pages
from turbolm.server.adapters import adapters, remove_adapter
from turbolm.server.chat import chat
from turbolm.server.completions import complete
from turbolm.server.embeddings import embeddings
from turbolm.server.failures import ApiError, JsonResponse, to_api_error
from turbolm.server.gate import Gate
from turbolm.server.messages import count_tokens, messages
from turbolm.server.metrics import CONTENT_TYPE
from turbolm.server.responses import input_items, respond, stored_response
from turbolm.server.service import Service
from turbolm.server.texts import detokenize, model, models, score, tokenize


async def health(_: Request) -> Response:
    """200 as long as the process answers."""
    return JsonResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while the engine does its work; 503 with the reason while it doesn't."""
    reason = request.app.state.service.why_not_ready()
    return JsonResponse({"status": reason or "ok"}, 503 if reason else 200)


async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE)


async def version(_: Request) -> Response:
    """turbolm's version."""
    return JsonResponse({"version": __version__})


ROUTES = (
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/v1/completions", complete, methods=["POST"]),
    Route("/v1/responses", respond, methods=["POST"]),
    Route("/v1/responses/{response}", stored_response, methods=["GET", "DELETE"]),
    Route("/v1/responses/{response}/input_items", input_items, methods=["GET"]),
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/adapters", adapters, methods=["GET", "POST"]),
    Route("/v1/adapters/{adapter:path}", remove_adapter, methods=["DELETE"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{model:path}", model, methods=["GET"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/score", score, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
    Route("/openapi.json", pages.openapi, methods=["GET"]),
    Route("/docs", pages.docs, methods=["GET"]),
    Route("/docs/{asset}", pages.asset, methods=["GET"]),
)


def make_app(service: Service) -> Starlette:
    """The application over a service; the service's heartbeat runs with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.heartbeat())]
        if service.shadow is not None:
            tasks.append(asyncio.create_task(service.shadow.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if service.tracing is not None:
                await asyncio.to_thread(service.tracing.close)
            if service.store is not None:
                await asyncio.to_thread(service.store.close)

    middleware = [Middleware(Gate, service=service)]
    if service.config.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(service.config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["anthropic-version", "authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        exception_handlers={TurbolmError: _refuse, HTTPException: _no_such_path},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, TurbolmError)
    return to_api_error(error).response(request.url.path)


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        text = f"{request.method} {path} is not allowed; use {allowed}"
        return ApiError(405, text, headers=error.headers).response(path)
    if error.status_code == 404:
        known = [route.path for route in request.app.routes]
        return ApiError(404, f"no such path: {path}.{nearest(path, known)} See /docs", code="not_found").response(path)
    return ApiError(error.status_code, error.detail).response(path)
