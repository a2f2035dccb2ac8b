"""What a model is told of arguments that do not fit: the field, what is expected, in one short line.

python -m pytest tests/test_functions_schema.py
"""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.agent.schema import check_schema, schema_error
from openglm.types import ToolSpec

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "name of a city", "minLength": 2, "pattern": "^[A-Z]"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "kelvin"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "stops": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/Stop"}},
        "when": {"anyOf": [{"$ref": "#/$defs/Stop"}, {"type": "null"}]},
    },
    "required": ["city"],
    "$defs": {
        "Stop": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "open": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"city": "Rome"}, None),
        ({"city": "Rome", "days": 3, "unit": "kelvin", "note": None, "stops": [{"x": 1}], "when": {"x": 2}}, None),
        ({}, "'city' is missing (a text: name of a city)"),
        ([], "the arguments of weather must be an object with names and values, not []"),
        ({"city": "Rome", "dais": 3}, "there is no argument 'dais' (did you mean 'days'?)"),
        ({"city": "Rome", "zzz": 3}, "there is no argument 'zzz' (there are: city, days, unit, note, stops, when)"),
        ({"city": 3}, "'city' must be a text, not 3"),
        ({"city": "Rome", "days": "three"}, "'days' must be a whole number, not \"three\""),
        ({"city": "Rome", "days": 0}, "'days' must be at least 1, not 0"),
        ({"city": "Rome", "days": 15}, "'days' must be at most 14, not 15"),
        ({"city": "R"}, "'city' must have at least 2 characters, not 1"),
        ({"city": "rome"}, "'city' must match ^[A-Z], which \"rome\" does not"),
        ({"city": "Rome", "unit": "C"}, '\'unit\' must be "celsius" or "kelvin", not "C"'),
        ({"city": "Rome", "note": 1}, "'note' must be a text or null, not 1"),
        ({"city": "Rome", "stops": [{"x": 1}, {"x": "a"}]}, "'stops[1].x' must be a number, not \"a\""),
        ({"city": "Rome", "stops": [{}]}, "'stops[0].x' is missing (a number)"),
        ({"city": "Rome", "stops": [{"x": 1, "opn": True}]}, "'stops[0]' has no 'opn' (did you mean 'open'?)"),
        ({"city": "Rome", "when": {"x": 1, "open": "yes"}}, "'when.open' must be true or false, not \"yes\""),
        ({"city": "Rome", "stops": [{"x": 1}] * 3}, "'stops' must have at most 2 items, not 3"),
        ({"days": 0, "unit": "C", "note": 1, "zzz": 1}, "; and 2 more"),
    ],
)
def test_the_field_and_what_is_expected(arguments: Any, words: str | None) -> None:
    found = schema_error(ToolSpec("weather", "", SCHEMA), arguments)
    if words is None:
        assert found is None
    elif words.startswith(";"):
        assert found is not None and found.endswith(words)
    else:
        assert found == words


def test_other_names_where_a_schema_allows_them() -> None:
    assert schema_error(ToolSpec("f", "", {}), {"anything": 1}) is None
    assert schema_error(ToolSpec("f", "", {"type": "object", "properties": {}}), {"a": 1}) is not None
    opened = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}
    assert schema_error(ToolSpec("f", "", opened), {"b": 1}) is None
    assert schema_error(ToolSpec("f", "", opened), {"b": "x"}) == "'b' must be a whole number, not \"x\""
    closed = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    assert schema_error(ToolSpec("f", "", closed), {"b": 1}) == "there is no argument 'b' (there are: a)"
    united = {"properties": {"a": {}}, "allOf": [{"properties": {"b": {"type": "integer"}}}]}
    assert schema_error(ToolSpec("f", "", united), {"b": 1}) is None


def test_a_schema_that_is_wrong_itself() -> None:
    for broken in ({"type": "no such type"}, {"minimum": "low"}):
        spec = ToolSpec("f", "", {"properties": {"a": broken}})
        with pytest.raises(ValueError, match="the parameters of the tool 'f' are no JSON schema"):
            check_schema(spec)
        found = schema_error(spec, {"a": 1})
        assert found is not None and "the schema of f is itself wrong" in found
    with pytest.raises(ValueError, match="must be a schema of type object"):
        check_schema(ToolSpec("f", "", {"type": "string"}))
    remote = {"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}}
    found = schema_error(ToolSpec("f", "", remote), {"a": 1})
    assert found is not None and "the schema of f is itself wrong" in found, "nothing is fetched"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.text("Rome", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "open", "y"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*SCHEMA["properties"], "other"]), JSON, max_size=5))
def test_it_says_something_exactly_where_the_validator_does(arguments: dict[str, Any]) -> None:
    strict = jsonschema.Draft202012Validator(SCHEMA | {"additionalProperties": False})
    found = schema_error(ToolSpec("weather", "", SCHEMA), arguments)
    assert (found is None) == strict.is_valid(arguments)
    assert found is None or ("\n" not in found and len(found) < 1000)
