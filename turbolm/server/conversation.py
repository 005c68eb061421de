"""The messages of a chat request: each of their fields is one that the model will see, or refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from turbolm.errors import RequestError, nearest
from turbolm.server.blocks import Fields, check_fields, kind_of
from turbolm.text import ChatTemplate

_COMMON = frozenset(("role", "content"))
_SAID = frozenset(("tool_calls", "reasoning_content", "reasoning", "thinking"))
# Fields of messages that clients send back as they got them, and that mean nothing when they are empty.
_ECHOED = frozenset(("refusal", "annotations", "audio", "function_call"))
_FIELDS = {
    "assistant": _COMMON | _SAID | _ECHOED | {"name"},
    "tool": _COMMON | {"tool_call_id", "name"},  # the name says what the id says
}
_OTHERS = _COMMON | {"name"}  # of the system, the user, and roles that a template may know
_TEXT: Fields = {"prompt_cache_breakpoint": dict}  # prompts are cached up to every place
_CALL: Fields = {"id": str, "type": str, "index": int}  # the latter as streams have it
_READS_NAMES = re.compile(r"""message(\.name\b|\[['"]name['"]\]|\.get\(['"]name['"])""")


def check_messages(messages: Sequence[dict[str, Any]], limit: int, template: ChatTemplate | None) -> None:
    """What the template doesn't see to. Raises RequestError for too many, and for fields that nobody reads."""
    if len(messages) > limit:
        raise RequestError(f"the conversation has {len(messages)} messages; this server allows {limit}", "messages")
    reads_names = template is not None and any(_READS_NAMES.search(source) for source in template.sources.values())
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", reads_names=reads_names)


def _check_message(message: dict[str, Any], where: str, *, reads_names: bool) -> None:
    role = message.get("role")
    if role == "function":
        raise RequestError(f"{where}.role 'function' is not served: use tools, and the role 'tool'", f"{where}.role")
    known = _FIELDS.get(role, _OTHERS) if isinstance(role, str) else _OTHERS
    for name, value in message.items():
        place = f"{where}.{name}"[:200]
        if name not in known:
            shown = ", ".join(sorted(known - _ECHOED))
            raise RequestError(
                f"unknown field '{place}' of a message of the role {role!r:.40}.{nearest(name, known)} Known: {shown}",
                place,
            )
        if name in _ECHOED and value:
            raise RequestError(f"{place} is not served: leave it out", place)
        if name == "name" and value is not None and role != "tool" and not reads_names:
            raise RequestError(f"{place} is not served: the model's chat template doesn't read names", place)
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            if isinstance(part, dict) and part.get("type") == "text":  # other types are refused later, by name
                check_fields(part, f"{where}.content[{number}]", {"type": str, "text": str}, _TEXT)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        for number, call in enumerate(calls):
            _check_call(call, f"{where}.tool_calls[{number}]")


def _check_call(call: object, where: str) -> None:
    kind_of(call, where, {"function": None}, default="function")
    checked = check_fields(call, where, {"function": dict}, _CALL)
    check_fields(checked["function"], f"{where}.function", {"name": str, "arguments": object})
