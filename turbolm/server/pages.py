"""/docs, the interactive page of the API, and /openapi.json. Nothing comes from the network: the page's scripts
are those of the package fastapi-offline."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from turbolm import __version__
from turbolm.server.adapters import AdapterBody
from turbolm.server.embeddings import EmbeddingsBody
from turbolm.server.failures import ApiError, JsonResponse
from turbolm.server.messages_schema import CountTokensBody, MessagesBody
from turbolm.server.responses_schema import ResponsesBody
from turbolm.server.schema import ChatBody, CompletionBody, DetokenizeBody, ScoreBody, TokenizeBody

_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>turbolm API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="page"></div><script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#page", validatorUrl: null, tryItOutEnabled: true})</script>
</body></html>
"""
_POSTS: dict[str, tuple[type[BaseModel], str, dict[str, Any]]] = {
    "/v1/chat/completions": (
        ChatBody,
        "Answer a conversation.",
        {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 100},
    ),
    "/v1/completions": (CompletionBody, "Continue texts.", {"prompt": "The sky is", "max_tokens": 20}),
    "/v1/embeddings": (EmbeddingsBody, "Texts as vectors.", {"input": "The sky is blue."}),
    "/v1/responses": (ResponsesBody, "Answer a text or a conversation.", {"input": "Why is the sky blue?"}),
    "/v1/messages": (
        MessagesBody,
        "Answer a conversation, as Anthropic's API does.",
        {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 100},
    ),
    "/v1/messages/count_tokens": (
        CountTokensBody,
        "How many tokens a conversation has.",
        {"messages": [{"role": "user", "content": "Why is the sky blue?"}]},
    ),
    "/v1/adapters": (AdapterBody, "Add a LoRA adapter.", {"name": "legal", "path": "/data/adapters/legal"}),
    "/tokenize": (TokenizeBody, "Token ids of a text or a conversation.", {"prompt": "Hello"}),
    "/detokenize": (DetokenizeBody, "The text of token ids.", {"tokens": [72, 105]}),
    "/score": (ScoreBody, "How likely the model finds a text.", {"text": "The sky is blue."}),
}
_GETS = {
    "/v1/responses/{response}": "A stored response.",
    "/v1/responses/{response}/input_items": "What a stored response answered to.",
    "/v1/adapters": "The model's LoRA adapters.",
    "/v1/models": "The model that is served, and its adapters.",
    "/v1/models/{model}": "The model, with its configuration and the reasons for it.",
    "/health": "Whether the process answers.",
    "/ready": "Whether the engine works.",
    "/metrics": "Counters and histograms for Prometheus.",
    "/version": "turbolm's version.",
}
_DELETES = {
    "/v1/adapters/{adapter}": "Remove a LoRA adapter; requests at work with it go on to their ends.",
    "/v1/responses/{response}": "Forget a stored response.",
}
_ERRORS = {
    "400": "The request can't be used as given; the message names the field.",
    "401": "No API key, or a wrong one.",
    "403": "The server doesn't let requests do this.",
    "404": "No such model or path.",
    "409": "A name is taken, or there is no room.",
    "413": "The body is too large.",
    "429": "The server is full; Retry-After says when to come back.",
    "503": "The server is shutting down.",
    "504": "The request took too long.",
}


async def docs(_: Request) -> Response:
    """The interactive page."""
    return HTMLResponse(_PAGE)


async def asset(request: Request) -> Response:
    """A script or style sheet of the page."""
    name = request.path_params["asset"]
    folder = _asset_folder()
    if name not in _ASSETS or folder is None:
        why = "install turbolm[server]" if folder is None else f"there is {', '.join(_ASSETS)}"
        raise ApiError(404, f"no file '{name[:80]}': {why}", code="not_found")
    return FileResponse(folder / name, media_type=_ASSETS[name], headers={"Cache-Control": "max-age=86400"})


async def openapi(_: Request) -> Response:
    """The OpenAPI document."""
    return JsonResponse(describe())


@cache
def describe() -> dict[str, Any]:
    """The API as an OpenAPI 3.1 document."""
    forms = [(form, "validation") for form, _, _ in _POSTS.values()]
    _, definitions = models_json_schema(forms, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = definitions["$defs"] | {"Error": _error_schema()}
    paths: dict[str, Any] = {}
    for path, (form, summary, example) in _POSTS.items():
        reference = {"$ref": f"#/components/schemas/{form.__name__}"}
        content = {"application/json": {"schema": reference, "example": example}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": _responses("JSON; server-sent events with stream = true." if "v1" in path else "JSON."),
            }
        }
    for method, path, summary in (
        *(("get", *item) for item in _GETS.items()),
        *(("delete", *item) for item in _DELETES.items()),
    ):
        names = re.findall(r"{(\w+)}", path)
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        described = {"summary": summary, "parameters": parameters, "responses": _responses("As said.")}
        paths.setdefault(path, {})[method] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "turbolm", "version": __version__, "description": "An OpenAI-compatible API."},
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _responses(success: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {status: {"description": text, "content": content} for status, text in _ERRORS.items()}
    return {"200": {"description": success}, **errors}


def _error_schema() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    error = {"type": "object", "properties": {"message": text, "type": text, "param": maybe, "code": maybe}}
    return {"type": "object", "properties": {"error": error}}


@cache
def _asset_folder() -> Path | None:
    spec = find_spec("fastapi_offline")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "static"
