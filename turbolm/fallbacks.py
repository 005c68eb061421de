"""What runs a slower way than it might: told once in the log, and to whoever loads the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_told: set[str] = set()
_listeners: list[list[str]] = []


def note_fallback(logger: logging.Logger, message: str) -> None:
    """Warns, once per process, and adds the message to what is being `collected`."""
    if message not in _told:
        _told.add(message)
        logger.warning("%s", message)
    for found in _listeners:
        if message not in found:
            found.append(message)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """The messages that come within the block."""
    found: list[str] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners[:] = [other for other in _listeners if other is not found]
