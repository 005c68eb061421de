"""Does a JSON value fit a schema? The part of JSON Schema that describes answers; what isn't known is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from turbolm.errors import nearest

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf")
_SCHEMA_MAPS = ("properties", "$defs", "definitions")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_KNOWN = (
    *("type", "enum", "const", "required", "pattern", "items", "prefixItems", "additionalProperties", "uniqueItems"),
    *("not", "$ref", *_SCHEMA_LISTS, *_SCHEMA_MAPS, *_NUMBERS, *_SIZES),
    *("title", "description", "default", "examples", "format", "$schema", "$id", "$comment"),  # say nothing of values
)
_MAX_DEPTH = 100


def check_schema(schema: object, where: str = "schema", depth: int = 0) -> str | None:
    """What is wrong with a schema, or not known here; None: it can be used."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return f"{where} must be an object"
    for name, value in schema.items():
        if name not in _KNOWN:
            return f"{where} has the keyword '{name}', which turbolm doesn't know.{nearest(name, _KNOWN)}"
        if not _is_valid(name, value):
            return f"{where}: the value of '{name}' can't be used: {value!r}"
    for name, part in _parts(schema):
        problem = check_schema(part, f"{where}.{name}", depth + 1)
        if problem:
            return problem
    return None


def _is_valid(name: str, value: object) -> bool:
    if name == "type":
        return all(isinstance(kind, str) and kind in _TYPES for kind in (value if isinstance(value, list) else [value]))
    if name in _NUMBERS:
        return _is_number(value) and (name != "multipleOf" or value > 0)
    if name in _SIZES:
        return type(value) is int and value >= 0
    if name in _SCHEMA_MAPS:
        return isinstance(value, dict)
    if name in (*_SCHEMA_LISTS, "prefixItems", "enum"):
        return isinstance(value, list)
    if name == "required":
        return isinstance(value, list) and all(isinstance(key, str) for key in value)
    if name == "$ref":
        return isinstance(value, str) and re.fullmatch(r"#(/(\$defs|definitions)/[^/]+)?", value) is not None
    if name == "pattern":
        return isinstance(value, str) and _compiles(value)
    return True


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("items", "additionalProperties", "not"):
        if name in schema:
            yield name, schema[name]
    for name in (*_SCHEMA_LISTS, "prefixItems"):
        yield from ((f"{name}[{number}]", part) for number, part in enumerate(schema.get(name, ())))
    for name in _SCHEMA_MAPS:
        yield from ((f"{name}.{key}", part) for key, part in schema.get(name, {}).items())


def mismatch(value: Any, schema: Any) -> str | None:
    """Where and how a value doesn't fit a schema that `check_schema` has passed; None: it does."""
    return _mismatch(value, schema, schema, "$", 0)


def _mismatch(value: Any, schema: Any, root: Any, at: str, depth: int) -> str | None:
    if schema is True:
        return None
    if schema is False or depth > _MAX_DEPTH:
        return f"{at} isn't allowed" if schema is False else f"{at} is nested too deeply"
    problems = (*_own_problems(value, schema, at), *_combined_problems(value, schema, root, at, depth))
    for problem in problems:
        return problem
    if isinstance(value, dict):
        return _object_problem(value, schema, root, at, depth)
    if isinstance(value, list):
        return _array_problem(value, schema, root, at, depth)
    return None


def _own_problems(value: Any, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is_type(value, kind) for kind in kinds):
            yield f"{at} is {value!r}, not of type {' or '.join(kinds)}"
    if "enum" in schema and not any(_equal(value, allowed) for allowed in schema["enum"]):
        yield f"{at} is {value!r}, not one of {schema['enum']}"
    if "const" in schema and not _equal(value, schema["const"]):
        yield f"{at} is {value!r}, not {schema['const']!r}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at} is {value!r}, which doesn't match {schema['pattern']}"
    if _is_number(value):
        yield from _number_problems(value, schema, at)
    for kind, suffix in ((str, "Length"), (list, "Items"), (dict, "Properties")):
        if isinstance(value, kind):
            low, high = schema.get(f"min{suffix}", 0), schema.get(f"max{suffix}")
            if len(value) < low or (high is not None and len(value) > high):
                yield f"{at} has {len(value)} {suffix.lower()}; allowed: {low} to {'any' if high is None else high}"


def _number_problems(value: float, schema: Mapping[str, Any], at: str) -> Iterator[str]:
    unit = schema.get("multipleOf", 0)
    for name, is_outside in (
        ("minimum", value < schema.get("minimum", -math.inf)),
        ("maximum", value > schema.get("maximum", math.inf)),
        ("exclusiveMinimum", value <= schema.get("exclusiveMinimum", -math.inf)),
        ("exclusiveMaximum", value >= schema.get("exclusiveMaximum", math.inf)),
        ("multipleOf", bool(unit) and abs(value / unit - round(value / unit)) > 1e-9),
    ):
        if is_outside:
            yield f"{at} is {value}, against '{name}' {schema[name]}"


def _combined_problems(value: Any, schema: Mapping[str, Any], root: Any, at: str, depth: int) -> Iterator[str]:
    if "$ref" in schema:
        names = schema["$ref"].split("/")[1:]
        target = root[names[0]].get(names[1]) if names and names[0] in root else root if not names else None
        problem = f"{schema['$ref']} leads nowhere" if target is None else _mismatch(value, target, root, at, depth + 1)
        if problem:
            yield problem
    for name in _SCHEMA_LISTS:
        if name not in schema:
            continue
        problems = [_mismatch(value, part, root, at, depth + 1) for part in schema[name]]
        num_fitting = problems.count(None)
        if name == "allOf" and num_fitting < len(problems):
            yield next(problem for problem in problems if problem)
        elif (name == "anyOf" and not num_fitting) or (name == "oneOf" and num_fitting != 1):
            yield f"{at} fits {num_fitting} of the schemas of '{name}'"
    if "not" in schema and _mismatch(value, schema["not"], root, at, depth + 1) is None:
        yield f"{at} fits the schema of 'not'"


def _object_problem(value: dict[str, Any], schema: Mapping[str, Any], root: Any, at: str, depth: int) -> str | None:
    for key in schema.get("required", ()):
        if key not in value:
            return f"{at} lacks '{key}'"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key, part in value.items():
        problem = _mismatch(part, properties.get(key, others), root, f"{at}.{key}", depth + 1)
        if problem:
            return problem
    return None


def _array_problem(value: list[Any], schema: Mapping[str, Any], root: Any, at: str, depth: int) -> str | None:
    first = schema.get("prefixItems", ())
    for number, part in enumerate(value):
        own = first[number] if number < len(first) else schema.get("items", True)
        problem = _mismatch(part, own, root, f"{at}[{number}]", depth + 1)
        if problem:
            return problem
    if schema.get("uniqueItems") and any(_equal(a, b) for i, a in enumerate(value) for b in value[:i]):
        return f"{at} has equal items"
    return None


def _is_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return _is_number(value) and float(value).is_integer()
    return isinstance(value, _TYPES[kind])


def _is_number(value: object) -> TypeGuard[float]:
    """Booleans and infinities are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b)
