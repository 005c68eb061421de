"""Objects inside of requests that come in many types: content blocks, input items. Each field is known or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from turbolm.errors import RequestError, TurbolmError, nearest
from turbolm.server.failures import ApiError, to_api_error

_NAMES = {
    str: "a string",
    int: "a number",
    object: "a value",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    type(None): "null",
}
Fields = Mapping[str, type]
NO_FIELDS: Fields = {}


def check_fields(value: object, where: str, needed: Fields, optional: Fields = NO_FIELDS) -> dict[str, Any]:
    """`value`, an object with the `needed` fields and perhaps `optional` ones, which may be null. Raises
    RequestError."""
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object, got {type(value).__name__}", where)
    for name, entry in value.items():
        place = f"{where}.{name}"[:200]
        kind = needed.get(name) or optional.get(name)
        if kind is None:
            known = [*needed, *optional]
            raise RequestError(f"unknown field '{place}'.{nearest(str(name), known)} Known: {', '.join(known)}", place)
        if not isinstance(entry, kind) and not (entry is None and name in optional):
            raise RequestError(f"{place} must be {_NAMES[kind]}, got {type(entry).__name__}", place)
    for name in needed:
        if name not in value:
            raise RequestError(f"{where}.{name} is missing", f"{where}.{name}")
    return value


def kind_of(value: object, where: str, known: Mapping[str, object], default: str | None = None) -> str:
    """The `type` of an object. RequestError where it's none of the known ones."""
    kind = value.get("type", default) if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in known:
        shown = repr(kind)[:80] if isinstance(value, dict) else type(value).__name__
        raise RequestError(f"{where}.type is {shown}; served: {', '.join(known)}", f"{where}.type")
    return kind


def text_content(content: object, where: str, kinds: Mapping[str, Fields]) -> str | list[dict[str, Any]]:
    """A text, or text blocks as the chat API has them. `kinds`: types of blocks, with their optional fields."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of blocks, got {type(content).__name__}", where)
    blocks = []
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        kind = kind_of(block, place, kinds)
        checked = check_fields(block, place, {"type": str, "text": str}, kinds[kind])
        blocks.append({"type": "text", "text": checked["text"]})
    return blocks


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields of another API: `names`, from chat's to its own."""
    try:
        yield
    except TurbolmError as error:
        found = to_api_error(error)
        top, _, rest = (found.parameter or "").partition(".")
        head = top.partition("[")[0]
        if head not in names:
            raise
        name = names[head]
        text = str(found).replace(head, name, 1)
        parameter = name + top[len(head) :] + (f".{rest}" if rest else "")
        raise ApiError(
            found.status, text, kind=found.kind, parameter=parameter, code=found.code, headers=found.headers
        ) from None
