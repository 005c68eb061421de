"""What every request passes: its id, the key, its place among the others, the boundary for bugs, its log line."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from datetime import datetime, timezone

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbolm.server.exchange import Record
from turbolm.server.failures import ApiError, internal
from turbolm.server.service import Service

logger = logging.getLogger(__name__)
access = logging.getLogger("turbolm.server.access")

OPEN_PATHS = frozenset(("/health", "/ready"))  # without a key
_QUIET_PATHS = OPEN_PATHS | {"/metrics"}  # asked for every few seconds: not worth a line
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gate:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = scope["record"] = Record(identity, scope["method"], scope["path"])

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self._serve(scope, receive, tagged, headers)
        except ApiError as error:
            await error.response(record.path)(scope, receive, tagged)
        except ClientDisconnect:
            record.outcome = "gone"
        except Exception:
            logger.exception("request %s failed", identity)
            record.outcome = "failed"
            if record.status:
                raise
            await internal().response(record.path)(scope, receive, tagged)
        finally:
            self._note(record)
            if self._service.tracing is not None:
                self._service.tracing.note(record, self._service.name, headers)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        if self._service.keys and scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._service.admit():
            await self._app(scope, receive, send)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        """ApiError unless the request brings one of the keys. Takes the same time whichever it is, if any."""
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        found = [hmac.compare_digest(given, key) for key in self._service.keys]
        if not any(found):
            said = "wrong API key" if given else "no API key"
            raise ApiError(
                401,
                f"{said}: send one that the server knows as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _note(self, record: Record) -> None:
        if record.status >= 500 and record.outcome == "ok":
            record.outcome = "failed"
        elif record.status >= 400 and record.outcome == "ok":
            record.outcome = "refused"
        known = record.path if record.path in _COUNTED else "other"
        self._service.metrics.requests[known, record.outcome, record.status] += 1
        if record.path not in _QUIET_PATHS and access.isEnabledFor(logging.INFO):
            access.info("%s", log_line(record, time.perf_counter()))


_COUNTED = frozenset((
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/models", "/tokenize", "/detokenize", "/score", "/health", "/ready",
    "/metrics", "/version", "/docs", "/openapi.json",
))  # fmt: skip


def log_line(record: Record, now: float) -> str:
    """One JSON object."""
    line: dict[str, object] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "id": record.id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "outcome": record.outcome,
        "seconds": round(now - record.started, 4),
    }
    if record.first_token:
        line |= {"first_token_seconds": round(record.first_token, 4)}
    if record.prompt_tokens or record.answer_tokens:
        line |= {"prompt_tokens": record.prompt_tokens, "answer_tokens": record.answer_tokens}
    return json.dumps(line | record.details, ensure_ascii=False)
