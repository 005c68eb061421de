"""Server-sent events of an OpenAI-compatible server, as their bytes come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from turbolm.errors import EngineError


class EventReader:
    """Reads one answer's stream. How its bytes are cut makes no difference."""

    def __init__(self) -> None:
        self.is_done = False
        """Whether [DONE] came; what follows is dropped."""
        self._rest = b""

    def read(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events that are complete with these further bytes. Raises EngineError for one that reports an error, and
        for what is none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self.is_done or not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                self.is_done = True
            elif text:
                yield _event(text)


def error_message(text: str) -> str:
    """The message inside an error body, else its beginning."""
    try:
        body = json.loads(text)
    except ValueError:
        return text.strip()[:200] or "no reason given"
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return str(body)[:500]


def _event(text: bytes) -> dict[str, Any]:
    shown = text[:100].decode(errors="replace")
    try:
        event = json.loads(text)
    except ValueError:
        raise EngineError(f"the server sent what isn't JSON: {shown}") from None
    if not isinstance(event, dict):
        raise EngineError(f"the server sent what isn't an event: {shown}")
    if event.get("error"):
        raise EngineError(f"the server failed: {error_message(text.decode(errors='replace'))}")
    return event
