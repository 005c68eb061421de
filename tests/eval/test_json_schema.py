from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.eval.json_schema import check_schema, mismatch

TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["value"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "fitting", "others"),
    [
        ({"type": "integer"}, [1, -2, 3.0], [1.5, "1", True, None, []]),
        ({"type": ["string", "null"]}, ["", None], [0, False]),
        ({"enum": [1, "a"]}, [1, "a", 1.0], [True, "b"]),
        ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [True]}, {"a": 1}]),
        ({"minimum": 1, "exclusiveMaximum": 3}, [1, 2.9, "text"], [0, 3]),
        ({"multipleOf": 0.1}, [0.3, 1], [0.25]),
        ({"pattern": "^a", "maxLength": 3}, ["abc", 5], ["b", "abcd"]),
        ({"minItems": 1, "uniqueItems": True, "items": {"type": "integer"}}, [[1], [1, 2]], [[], [1, 1], ["a"]]),
        ({"prefixItems": [{"type": "string"}], "items": False}, [["a"], []], [["a", 1], [1]]),
        ({"required": ["a"], "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
        ({"additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "b"}]),
        ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, [1, "ab"], ["a"]),
        ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, [0, 4], [2]),
        ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, [2], [0, 4]),
        ({"not": {"type": "string"}}, [1], ["a"]),
        ({"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}}, [[1]], [["a"]]),
        (TREE, [{"value": 1, "children": [{"value": 2}]}], [{"value": 1, "children": [{}]}, {"value": 1, "x": 2}]),
        (True, [1, None], []),
        (False, [], [1, None]),
    ],
)
def test_values(schema: Any, fitting: list[Any], others: list[Any]) -> None:
    assert check_schema(schema) is None
    assert [value for value in fitting if mismatch(value, schema) is not None] == []
    assert [value for value in others if mismatch(value, schema) is None] == []


def test_a_mismatch_says_where() -> None:
    value = {"value": 1, "children": [{"value": "x"}]}
    assert mismatch(value, TREE) == '$.children[0].value: "x" is not of type "integer"'


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (5, "must be an object"),
        ({"tpye": "string"}, "Did you mean 'type'?"),
        ({"items": {"anyOf": [{"mimimum": 1}]}}, "schema.items.anyOf[0] has the keyword 'mimimum'"),
        ({"type": "text"}, "schema.type can't be used"),
        ({"items": {"pattern": "("}}, "schema.items.pattern can't be used"),
        ({"minLength": -1}, "schema.minLength can't be used"),
        ({"$ref": "http://example.org/schema"}, "schemas are not fetched"),
        ({"$ref": "#/$defs/missing"}, "can't be used"),
        ({"properties": {"a": {"multipleOf": 0}}}, "schema.properties.a.multipleOf can't be used"),
        ({"properties": 5}, "schema.properties can't be used"),
    ],
)
def test_schemas_that_cannot_be_used(schema: Any, message: str) -> None:
    assert message in (check_schema(schema) or "")


def test_endless_references_end() -> None:
    loop = {"$ref": "#"}
    assert check_schema(loop) is None
    assert mismatch(1, loop) is None, "nothing speaks against it"


def test_what_is_no_json_fits_nothing() -> None:
    assert "none in JSON" in (mismatch([float("inf")], {"type": "array"}) or "")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children, max_size=3),
    max_leaves=6,
)


@given(json_values)
def test_every_value_fits_itself(value: Any) -> None:
    assert mismatch(value, {"const": value}) is None
    assert mismatch(value, {"enum": ["other", value]}) is None
    assert mismatch(value, {"not": {"const": value}}) is not None
