"""Where the tool calls that a format reads go, on their way to becoming parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from turbolm.text.scanner import Mismatch, Scanner
from turbolm.types import ToolCallPart


class ToolCalls:
    """Takes calls from a format's reader (`begin`, `write`…, `end`) and hands out parts.

    Under `is_streaming` a call goes out from its name on. Otherwise it waits until it is complete,
    or, under `is_atomic`, until all of its group are.
    """

    def __init__(self, scan: Scanner, tools: Sequence[Mapping[str, Any]], is_streaming: bool, is_atomic: bool) -> None:
        self._scan = scan
        self._tools = tools
        self._is_streaming = is_streaming and not is_atomic
        self._is_atomic = is_atomic
        self._head: tuple[str, str] | None = None  # id and name of a call just begun
        self._arguments: list[str] = []
        self._waiting: list[ToolCallPart] = []
        self._ready: list[ToolCallPart] = []
        self._num_begun = 0
        self._num_accepted = 0

    def begin(self, name: str, call_id: str) -> None:
        """Mismatch where `name` can't be one."""
        if not name or not name.isprintable():
            raise Mismatch
        self._head = (call_id, name)
        self._num_begun += 1
        if self._is_streaming:
            self._accept()

    def write(self, arguments: str) -> None:
        """A further piece of the JSON text of the arguments."""
        self._arguments.append(arguments)
        if self._is_streaming:
            self._accept()

    def end(self) -> None:
        """The call is complete."""
        self._flush()
        if not self._is_atomic:
            self.accept()

    def accept(self) -> None:
        """What was read is right: the calls that wait go out."""
        self._ready += self._waiting
        self._waiting.clear()
        self._accept()

    def reject(self) -> None:
        """What was read since the last acceptance is no call."""
        if self._is_streaming:
            self._flush()
            self._ready += self._waiting
        self._waiting.clear()
        self._arguments.clear()
        self._head = None
        self._num_begun = self._num_accepted

    def take(self) -> list[ToolCallPart]:
        """The parts that may go out now."""
        if self._is_streaming:
            self._flush()
            self._ready += self._waiting
            self._waiting.clear()
        ready, self._ready = self._ready, []
        return ready

    def parameter_types(self, tool: str, parameter: str) -> frozenset[str]:
        """The JSON schema types that the request's tools allow for a parameter; empty: not known."""
        for entry in self._tools:
            function = _member(entry, "function") or entry
            if _member(function, "name") == tool:
                properties = _member(_member(function, "parameters"), "properties")
                return frozenset(_schema_types(_member(properties, parameter)))
        return frozenset()

    def _accept(self) -> None:
        self._num_accepted = self._num_begun
        self._scan.commit()

    def _flush(self) -> None:
        if self._head is not None:
            part = ToolCallPart(self._num_begun - 1, "".join(self._arguments), *self._head)
        elif self._arguments:
            part = ToolCallPart(self._num_begun - 1, "".join(self._arguments))
        else:
            return
        self._head = None
        self._arguments.clear()
        self._waiting.append(part)


def _schema_types(schema: object) -> Iterator[str]:
    kinds = _member(schema, "type")
    yield from (kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str))
    for key in ("anyOf", "oneOf"):
        for choice in _member(schema, key) or ():
            yield from _schema_types(choice)


def _member(value: object, key: str) -> Any:
    """`value[key]`; None where there is no such thing: schemas are the user's."""
    return value.get(key) if isinstance(value, Mapping) else None
