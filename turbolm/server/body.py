"""From the bytes of a request's body to a checked value."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from turbolm.errors import nearest
from turbolm.server.failures import ApiError

Parsed = TypeVar("Parsed", bound=BaseModel)

BODY_SECONDS = 60.0  # for all of a body to arrive
_OFF_LOOP_BYTES = 1 << 18  # bodies from here on are parsed in a thread
_MAX_SHOWN = 80  # characters of a bad value in a message


async def read_body(request: Request, form: type[Parsed], limit: int) -> tuple[Parsed, bytes]:
    """The body as a `form`, and as it came. Raises ApiError: malformed, too slow, too large, or not JSON."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() not in ("application/json", ""):
        raise ApiError(415, f"the body must be JSON: send Content-Type: application/json, not {content_type[:80]!r}")
    try:
        data = await asyncio.wait_for(_receive(request, limit), BODY_SECONDS)
    except asyncio.TimeoutError:
        close = {"Connection": "close"}
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", headers=close) from None
    if len(data) < _OFF_LOOP_BYTES:
        return parse(data, form), data
    return await asyncio.to_thread(parse, data, form), data


async def _receive(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "0")
    size, chunks = 0, []
    if len(length) < 20 and int(length) <= limit:  # the HTTP parser has refused what is no number
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            chunks.append(chunk)
        else:
            return b"".join(chunks)
    close = {"Connection": "close"}
    raise ApiError(413, f"the body is larger than max_body, {limit} bytes", code="body_too_large", headers=close)


def parse(data: bytes, form: type[Parsed]) -> Parsed:
    """JSON as a `form`. Raises ApiError, which names the field at fault."""
    try:
        return form.model_validate_json(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=True)
        raise _refusal(form, details[0]) from None


def build(values: Mapping[str, Any], form: type[Parsed]) -> Parsed:
    """Fields as a `form`; those that are None are left out. Raises ApiError, as `parse`."""
    try:
        return form.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=True)
        raise _refusal(form, details[0]) from None


def _refusal(form: type[BaseModel], detail: Mapping[str, Any]) -> ApiError:
    """The first thing that is wrong, in one sentence."""
    kind, location = detail["type"], detail["loc"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {detail['ctx']['error']}", code="invalid_json")
    if not location:
        return ApiError(400, "the body must be a JSON object")
    path = ".".join(str(step) for step in location)[:200]
    instead: Mapping[str, str] = getattr(form, "instead", {})
    if kind == "extra_forbidden":
        name = str(location[-1])[:200]
        known = form.model_fields if len(location) == 1 else ()
        return ApiError(400, f"unknown field '{path}'.{nearest(name, known)}", parameter=path, code="unknown_field")
    if kind == "missing":
        return ApiError(400, f"the field '{path}' is missing", parameter=path, code="missing_field")
    top = path if path in instead else str(location[0])
    given = repr(detail["input"])
    given = given if len(given) <= _MAX_SHOWN else f"{given[:_MAX_SHOWN]}…"
    if top in instead:
        path = top
        return ApiError(400, f"'{path}' can't be {given}: {instead[path]}", parameter=path)
    if kind == "none_required":
        return ApiError(400, f"the field '{path}' is not served: leave it out", parameter=path, code="not_served")
    return ApiError(400, f"'{path}': {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {given}", parameter=path)
