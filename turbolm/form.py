"""What an answer's text has to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from turbolm.errors import RequestError, nearest

MAX_GRAMMAR_CHARS = 1 << 18
MAX_SCHEMA_DEPTH = 64  # of nested objects and lists in a JSON schema

GrammarKind = Literal["json", "json_schema", "regex", "choice", "ebnf"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer's text must be. Every token is chosen so that the text can still become such a text, and
    the answer ends, with "stop", where it has. Small enough is checked here; whether the rest is right, when
    the request is prepared (turbolm/grammar)."""

    kind: GrammarKind
    """json: an object; json_schema: JSON of a schema; regex: all of the text matches; choice: one of
    several texts; ebnf: a context-free grammar, in Lark's notation or llama.cpp's."""
    value: Any = None
    """None for json; a schema, as an object or its JSON; a regular expression; a list of texts; a grammar."""
    thoughts: tuple[str, str] | None = None
    """Markers around free text that comes first; it may be missing, but where the first marker is empty (the
    prompt has opened it). Filled in from the model's chat template."""
    parameter: str = field(default="grammar", compare=False)
    """The request's field that it comes from, for errors."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _GRAMMAR_VALUES.get(self.kind, _unknown_grammar)(self.value, self.kind))
        size = sum(map(len, self.value)) if isinstance(self.value, (str, tuple)) else 0
        if size > MAX_GRAMMAR_CHARS:
            raise RequestError(f"the {self.kind} has {size} characters; allowed are {MAX_GRAMMAR_CHARS}", "grammar")
        if self.thoughts is not None:
            object.__setattr__(self, "thoughts", tuple(self.thoughts))


def _unknown_grammar(_: object, kind: str) -> object:
    known = ", ".join(_GRAMMAR_VALUES)
    raise RequestError(
        f"unknown kind of grammar {kind!r}.{nearest(str(kind), _GRAMMAR_VALUES)} Known: {known}", "grammar"
    )


def _no_value(value: object, kind: str) -> None:
    if value is not None:
        raise RequestError(f"a grammar of kind {kind} takes no value; for a schema, use json_schema", "grammar")


def _schema_text(value: object, _: str) -> str:
    """Its canonical JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(text) > MAX_GRAMMAR_CHARS:
            return text  # refused by its caller
        schema = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the schema is no JSON: {error}", "grammar") from None
    if not isinstance(schema, dict):
        raise RequestError(f"a schema is an object, got {text[:80]}", "grammar")
    level: list[object] = [schema]
    for _depth in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return json.dumps(schema, ensure_ascii=False)
    raise RequestError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} deep", "grammar")


def _grammar_text(value: object, kind: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"a grammar of kind {kind} takes a string, got {value!r:.80}", "grammar")
    return value


def _choices(value: object, _: str) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"a choice takes a list of non-empty strings, got {value!r:.80}", "grammar")
    return tuple(dict.fromkeys(texts))


_GRAMMAR_VALUES: dict[str, Callable[[object, str], Any]] = {
    "json": _no_value,
    "json_schema": _schema_text,
    "regex": _grammar_text,
    "choice": _choices,
    "ebnf": _grammar_text,
}
