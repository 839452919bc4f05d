"""Patches as Kubernetes applies them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mend_local.patches import BadPatch, json_patch, merge_patch, strategic_patch

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def without_nulls(value: Any) -> Any:
    """What is left of a patch when nothing is there to be merged with."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return value


@given(OBJECTS, OBJECTS)
def test_merging_twice_is_merging_once(target: Any, patch: Any) -> None:
    """A merge patch applied again changes nothing more, and applied to nothing it is the patch without its nulls."""
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once
    assert merge_patch({}, patch) == without_nulls(patch)


@pytest.mark.parametrize(
    ("target", "patch", "expected"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_as_the_rfc_has_it(target: Any, patch: Any, expected: Any) -> None:
    """Objects merge, null removes, everything else replaces (cases of RFC 7386)."""
    assert merge_patch(target, patch) == expected


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([{"op": "add", "path": "/l/1", "value": 9}], {"l": [1, 9, 2], "o": {"x": 1}}),
        ([{"op": "add", "path": "/l/-", "value": 9}], {"l": [1, 2, 9], "o": {"x": 1}}),
        ([{"op": "remove", "path": "/l/0"}], {"l": [2], "o": {"x": 1}}),
        ([{"op": "replace", "path": "/l/0", "value": 7}], {"l": [7, 2], "o": {"x": 1}}),
        ([{"op": "move", "from": "/o/x", "path": "/y"}], {"l": [1, 2], "o": {}, "y": 1}),
        ([{"op": "copy", "from": "/o", "path": "/p"}], {"l": [1, 2], "o": {"x": 1}, "p": {"x": 1}}),
        ([{"op": "test", "path": "/o/x", "value": 1}, {"op": "remove", "path": "/o"}], {"l": [1, 2]}),
        ([{"op": "replace", "path": "", "value": {}}], {}),
    ],
)
def test_json_patch_operations(operations: Any, expected: Any) -> None:
    """Each operation of RFC 6902 does its work and leaves the given object alone."""
    given_object = {"l": [1, 2], "o": {"x": 1}}
    assert json_patch(given_object, operations) == expected
    assert given_object == {"l": [1, 2], "o": {"x": 1}}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/a", "value": 2},
        {"op": "remove", "path": "/missing"},
        {"op": "replace", "path": "/missing", "value": 1},
        {"op": "add", "path": "/l/7", "value": 1},
        {"op": "add", "path": "/l/-1", "value": 1},
        {"op": "add", "path": "a", "value": 1},
        {"op": "dance", "path": "/a"},
        {"path": "/a"},
        "nonsense",
    ],
)
def test_bad_json_patches_are_named(operation: Any) -> None:
    """An operation that cannot be done is named in the error."""
    with pytest.raises(BadPatch, match="operation 0"):
        json_patch({"a": 1, "l": []}, [operation])


def test_strategic_patches() -> None:
    """Known lists merge by key, with directives to delete, replace and order; other lists are replaced."""
    pod = {
        "containers": [{"name": "a", "args": ["1"], "env": [{"name": "X", "value": "1"}]}, {"name": "b"}],
        "finalizers": ["one"],
        "tolerations": [{"key": "k"}],
    }
    patch = {
        "$setElementOrder/containers": [{"name": "c"}, {"name": "a"}],
        "containers": [
            {"name": "a", "args": ["2"], "env": [{"name": "Y", "value": "2"}]},
            {"name": "b", "$patch": "delete"},
            {"name": "c"},
        ],
        "finalizers": ["two"],
        "tolerations": [],
    }
    assert strategic_patch(pod, patch) == {
        "containers": [
            {"name": "c"},
            {"name": "a", "args": ["2"], "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]},
        ],
        "finalizers": ["one", "two"],
        "tolerations": [],
    }
    assert strategic_patch({"finalizers": ["a", "b"]}, {"$deleteFromPrimitiveList/finalizers": ["a"]}) == {
        "finalizers": ["b"]
    }
    assert strategic_patch({"labels": {"a": "1"}}, {"labels": {"$patch": "replace", "b": "2"}}) == {
        "labels": {"b": "2"}
    }
    assert strategic_patch({"volume": {"a": 1, "b": 2}}, {"volume": {"$retainKeys": ["b"], "b": 3}}) == {
        "volume": {"b": 3}
    }


def test_strategic_patches_without_the_key_are_refused() -> None:
    """An item that does not say which one it means is an error."""
    with pytest.raises(BadPatch, match="merge key: name"):
        strategic_patch({"containers": [{"name": "a"}]}, {"containers": [{"image": "x"}]})
