"""Schemas and rules of custom resources in the corners that the conformance tests leave out."""

from __future__ import annotations

from typing import Any

import pytest

from mend_local.rules import BadRule
from mend_local.schema import Schema


def schema(**spec: Any) -> Schema:
    """A schema whose objects have a `spec` as given."""
    return Schema({"type": "object", "properties": {"spec": spec}})


def told(checked: Schema, spec: Any, old: Any = None) -> list[str]:
    """The problems with an object of this spec."""
    before = None if old is None else {"spec": old}
    return [str(cause) for cause in checked.problems({"spec": spec}, before)]


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ({"type": "integer"}, True, 'spec in body must be of type integer: "boolean"'),
        ({"type": "integer"}, 1.5, 'spec in body must be of type integer: "number"'),
        ({"type": "string"}, None, 'spec in body must be of type string: "null"'),
        ({"x-kubernetes-int-or-string": True}, [], "must be of type integer,string"),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, 0, "should be greater than 0"),
        ({"type": "number", "maximum": 1, "exclusiveMaximum": True}, 1, "should be less than 1"),
        ({"type": "integer", "multipleOf": 4}, 6, "should be a multiple of 4"),
        ({"type": "integer", "format": "int32"}, 2**31, "must be of type int32"),
        ({"type": "string", "minLength": 2}, "a", "should be at least 2 chars long"),
        ({"type": "string", "maxLength": 2}, "abc", "may not be more than 2 bytes"),
        ({"type": "string", "format": "date-time"}, "soon", "must be of type date-time"),
        ({"type": "string", "format": "duration"}, "1 week", "must be of type duration"),
        ({"type": "array", "minItems": 1}, [], "should have at least 1 items"),
        ({"type": "array", "maxItems": 1}, [1, 2], "must have at most 1 items"),
        ({"type": "array", "x-kubernetes-list-type": "set"}, ["a", "a"], 'spec[1]: Duplicate value: "a"'),
        ({"type": "object", "minProperties": 1}, {}, "should have at least 1 properties"),
        ({"type": "object", "maxProperties": 0}, {"a": 1}, "should have at most 0 properties"),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {}, "at least one schema (anyOf)"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1, "b": 1}, "one and only one schema (oneOf)"),
        ({"not": {"required": ["a"]}}, {"a": 1}, "must not validate the schema (not)"),
        ({"allOf": [{"minimum": 3}]}, 2, "should be greater than or equal to 3"),
    ],
)
def test_violations(rule: dict[str, Any], value: Any, expected: str) -> None:
    """Each keyword of a schema is checked, and the message says what is expected."""
    (problem,) = told(schema(**rule), value)
    assert expected in problem


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ({"type": "integer"}, 2.0),
        ({"type": "string", "nullable": True}, None),
        ({"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}, "50%"),
        ({"type": "string", "format": "date-time"}, "2026-01-01T00:00:00Z"),
        ({"type": "string", "format": "duration"}, "1h30m"),
        ({"type": "string", "pattern": "b"}, "abc"),
    ],
)
def test_accepted_values(rule: dict[str, Any], value: Any) -> None:
    """Values that Kubernetes accepts are accepted."""
    assert told(schema(**rule), value) == []


def test_map_lists_hold_each_key_once() -> None:
    """Two items of a map list with equal keys are duplicates; without a key they are told apart by the others."""
    keyed = schema(
        type="array",
        items={"type": "object"},
        **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name", "port"]},
    )
    assert told(keyed, [{"name": "a", "port": 1}, {"name": "a", "port": 2}]) == []
    assert "Duplicate value" in told(keyed, [{"name": "a"}, {"name": "a"}])[0]


def test_metadata_is_neither_pruned_nor_checked_by_the_schema() -> None:
    """apiVersion, kind and metadata stay whatever the schema says; in embedded resources, too."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"labels": {"a": "b"}}, "spec": {"x": 1}}
    embedded = {"type": "object", "x-kubernetes-embedded-resource": True, "properties": {}}
    checked = schema(type="object", properties={"pod": embedded})
    admitted, unknown = checked.admit(
        {"apiVersion": "g/v1", "metadata": {"name": "x"}, "spec": {"pod": pod}, "more": 1}
    )
    assert admitted["metadata"] == {"name": "x"}
    assert admitted["spec"]["pod"] == {"apiVersion": "v1", "kind": "Pod", "metadata": {"labels": {"a": "b"}}}
    assert unknown == ["spec.pod.spec", "more"]


def test_null_means_absent_where_there_is_a_default() -> None:
    """A null for a field with a default is replaced by it, unless null is allowed."""
    checked = schema(
        type="object",
        properties={
            "plain": {"type": "integer", "default": 1},
            "nullable": {"type": "integer", "default": 1, "nullable": True},
        },
    )
    admitted, _ = checked.admit({"spec": {"plain": None, "nullable": None}})
    assert admitted["spec"] == {"plain": 1, "nullable": None}


def test_defaults_are_copies() -> None:
    """Changing a defaulted value of one object changes neither the schema nor the next object."""
    checked = schema(type="object", properties={"list": {"type": "array", "default": ["a"]}})
    first, _ = checked.admit({"spec": {}})
    first["spec"]["list"].append("b")
    second, _ = checked.admit({"spec": {}})
    assert second["spec"]["list"] == ["a"]


def test_rules_tell_reason_field_and_message() -> None:
    """A rule's messageExpression, reason and fieldPath shape what is told."""
    rule = {
        "rule": "self.low <= self.high",
        "messageExpression": "'low is ' + string(self.low)",
        "reason": "FieldValueForbidden",
        "fieldPath": ".low",
    }
    checked = schema(type="object", **{"x-kubernetes-validations": [rule]})
    assert told(checked, {"low": 2, "high": 1}) == ["spec.low: Forbidden: low is 2"]


def test_rules_that_cannot_be_answered_are_violations() -> None:
    """A rule that asks for an absent field without has() is told as an evaluation error, not taken as true."""
    checked = schema(type="object", **{"x-kubernetes-validations": [{"rule": "self.absent > 1"}]})
    (problem,) = told(checked, {})
    assert "rule evaluation error" in problem


def test_rules_are_asked_beside_bad_values_but_not_of_bad_shapes() -> None:
    """A value out of range does not hide a broken rule; a field of the wrong type does, and that is told."""
    rule = {"rule": "self.low <= self.high", "message": "low must be at most high"}
    bounds = {"low": {"type": "integer", "minimum": 0}, "high": {"type": "integer"}}
    checked = schema(type="object", properties=bounds, **{"x-kubernetes-validations": [rule]})
    out_of_range = told(checked, {"low": -1, "high": -2})
    assert len(out_of_range) == 2
    assert "low must be at most high" in out_of_range[1]
    wrong_type = told(checked, {"low": "x", "high": -2})
    assert len(wrong_type) == 2
    assert "some validation rules were not checked" in wrong_type[1]


def test_transition_rules_follow_items_by_their_keys() -> None:
    """In a map list oldSelf is the old item of the same key; a new item has none, so the rule does not apply."""
    item = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {
                "type": "integer",
                "x-kubernetes-validations": [{"rule": "self >= oldSelf", "message": "cannot shrink"}],
            },
        },
    }
    checked = schema(
        type="array",
        items=item,
        **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    old = [{"name": "a", "size": 5}, {"name": "b", "size": 1}]
    assert told(checked, [{"name": "b", "size": 1}, {"name": "a", "size": 5}, {"name": "c", "size": 0}], old) == []
    assert told(checked, [{"name": "b", "size": 1}, {"name": "a", "size": 4}], old) == [
        "spec[1].size: Invalid value: 4: cannot shrink"
    ]


def test_rules_see_maps_by_value() -> None:
    """Rules below additionalProperties are asked of every value."""
    value = {"type": "integer", "x-kubernetes-validations": [{"rule": "self % 2 == 0", "message": "must be even"}]}
    checked = schema(type="object", additionalProperties=value)
    assert told(checked, {"a": 2, "b": 3}) == ["spec.b: Invalid value: 3: must be even"]


def test_rules_that_do_not_compile_name_their_place() -> None:
    """A rule with an error is refused with the path to it and the compiler's reason."""
    with pytest.raises(BadRule, match=r"properties\[spec\].*undeclared reference to 'nonsense'"):
        schema(type="object", **{"x-kubernetes-validations": [{"rule": "nonsense(self)"}]})
