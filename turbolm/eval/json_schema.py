"""Does a JSON value fit a schema? jsonschema-rs says so (JSON Schema, draft 2020-12). Stricter than the standard:
keywords that it doesn't know are refused, since they are misspelt, and no schema is fetched from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs

from turbolm.errors import nearest

_PARTS = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_PART_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_PART_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_KNOWN = (
    *("type", "enum", "const", "required", "pattern", "uniqueItems", "minimum", "maximum", "exclusiveMinimum"),
    *("exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems", "minProperties"),
    *("maxProperties", "minContains", "maxContains", "dependentRequired", "$ref", "$anchor", "$schema", "$id"),
    *("$comment", "title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly"),
    *(*_PARTS, *_PART_LISTS, *_PART_MAPS),
)
_MAX_DEPTH = 100
_MAX_SHOWN = 200  # characters of a problem


def check_schema(schema: object) -> str | None:
    """What is wrong with a schema, or not known here; None: it can be used."""
    if not isinstance(schema, (dict, bool)):
        return "schema must be an object"
    unserved = next(_unserved(schema, "schema", 0), None)
    if unserved is not None:
        return unserved
    try:
        _validator(schema)
    except ValueError as error:  # also of values that are no JSON
        message, path = getattr(error, "message", str(error)), getattr(error, "instance_path", [])
        return f"{_place('schema', path)} can't be used: {message}"[:_MAX_SHOWN]
    return None


def mismatch(value: Any, schema: Any) -> str | None:
    """Where and how a value doesn't fit a schema that `check_schema` has passed; None: it does."""
    if not _is_json(value):
        return "the value holds a number that is none in JSON, or is nested too deeply"
    error = next(iter(_validator(schema).iter_errors(value)), None)
    return None if error is None else f"{_place('$', error.instance_path)}: {error.message}"[:_MAX_SHOWN]


def _validator(schema: Any) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(schema, retriever=_refuse)


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} is not in the schema")


def _unserved(schema: object, where: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        yield f"{where} is nested too deeply"
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return
    for name in schema:
        if name not in _KNOWN:
            yield f"{where} has the keyword '{name}', which turbolm doesn't know.{nearest(str(name), _KNOWN)}"
    if not str(schema.get("$ref", "#")).startswith("#"):
        yield f"{where}.$ref can't be used: {schema['$ref']!r:.80} is elsewhere, and schemas are not fetched"
    for name, part in _parts(schema):
        yield from _unserved(part, f"{where}.{name}", depth + 1)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, as far as it has them where they belong."""
    for name, value in schema.items():
        if name in _PARTS:
            yield name, value
        elif name in _PART_LISTS and isinstance(value, list):
            yield from ((f"{name}[{number}]", part) for number, part in enumerate(value))
        elif name in _PART_MAPS and isinstance(value, dict):
            yield from ((f"{name}.{key}", part) for key, part in value.items())


def _place(root: str, path: list[str | int]) -> str:
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True
