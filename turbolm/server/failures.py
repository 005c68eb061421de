"""What can go wrong with a request, as the API reports it: a status and OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from turbolm.errors import (
    CapacityError,
    ContextOverflowError,
    DeadlineError,
    RequestError,
    TemplateError,
    TurbolmError,
    UserError,
)

RETRY_SECONDS = 1
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_KINDS = {
    401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(TurbolmError):
    """An error with the status and the words that a client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.parameter = parameter
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        error = {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.code}
        return {"error": error}

    @property
    def anthropic_body(self) -> dict[str, object]:
        """As Anthropic's API says it."""
        kind = _ANTHROPIC_KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(self)}}

    def response(self, path: str = "") -> Response:
        """In the words of the API that `path` belongs to."""
        body = self.anthropic_body if path.startswith(ANTHROPIC_PATH) else self.body
        return JsonResponse(body, self.status, self.headers)


class JsonResponse(Response):
    media_type = "application/json"

    def __init__(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(content), status, headers)


def to_json(value: object) -> bytes:
    """Compact JSON, as UTF-8. The values are finite."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def to_api_error(error: TurbolmError) -> ApiError:
    """Any of turbolm's errors with its status."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, ContextOverflowError):
        return ApiError(400, text, parameter=error.parameter, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, text, parameter=error.parameter)
    if isinstance(error, TemplateError):
        return ApiError(400, text, parameter="messages")
    if isinstance(error, CapacityError):
        return busy(text)
    if isinstance(error, DeadlineError):
        return _late(text, "timeout")
    if isinstance(error, UserError):
        return ApiError(400, text)
    return ApiError(500, text, kind="server_error", code="engine_error")


def busy(text: str) -> ApiError:
    return ApiError(429, text, kind="rate_limit_error", code="server_busy", headers={"Retry-After": str(RETRY_SECONDS)})


def closing() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down",
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
    )


def timed_out(seconds: float) -> ApiError:
    return _late(f"the request was not done within the server's request_timeout of {seconds:g} s: ask for less at once")


def _late(text: str, parameter: str | None = None) -> ApiError:
    """`x-should-retry` tells OpenAI's clients not to send again what takes too long."""
    retry = {"x-should-retry": "false"}
    return ApiError(504, text, kind="server_error", parameter=parameter, code="timeout", headers=retry)


def internal() -> ApiError:
    """For bugs: the log has the details."""
    return ApiError(500, "internal error; the server's log has the details", kind="server_error", code="internal")
