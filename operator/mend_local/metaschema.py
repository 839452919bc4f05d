"""The schema of schemas: what is wrong with a definition's openAPIV3Schema before anything is checked against it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mend_local.failures import Cause
from mend_local.validation import validate

Raw = dict[str, Any]

_TEXT: Raw = {"type": "string"}
_NUMBER: Raw = {"type": "number"}
_COUNT: Raw = {"type": "integer", "minimum": 0}
_FLAG: Raw = {"type": "boolean"}
_TEXTS: Raw = {"type": "array", "items": _TEXT}
_RULE: Raw = {
    "type": "object",
    "required": ["rule"],
    "properties": {"rule": _TEXT, "message": _TEXT, "messageExpression": _TEXT, "reason": _TEXT, "fieldPath": _TEXT},
}
_KEYWORDS: Raw = {
    "type": {**_TEXT, "enum": ["array", "boolean", "integer", "number", "object", "string"]},
    "description": _TEXT,
    "format": _TEXT,
    "nullable": _FLAG,
    "enum": {"type": "array"},
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _FLAG,
    "exclusiveMaximum": _FLAG,
    "multipleOf": {**_NUMBER, "minimum": 0, "exclusiveMinimum": True},
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "pattern": _TEXT,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "uniqueItems": _FLAG,
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "required": _TEXTS,
    "x-kubernetes-preserve-unknown-fields": _FLAG,
    "x-kubernetes-embedded-resource": _FLAG,
    "x-kubernetes-int-or-string": _FLAG,
    "x-kubernetes-list-type": {**_TEXT, "enum": ["atomic", "map", "set"]},
    "x-kubernetes-list-map-keys": _TEXTS,
    "x-kubernetes-map-type": _TEXT,
    "x-kubernetes-validations": {"type": "array", "items": _RULE},
}


def problems(raw: Any, path: str) -> Iterator[Cause]:
    """Every keyword of a schema, or of one inside it, whose value makes no sense."""
    found = list(validate(raw, {"type": "object", "properties": _KEYWORDS}, path))
    if found:
        yield from found
        return
    if "pattern" in raw:
        try:
            re.compile(raw["pattern"])
        except re.error as error:
            yield Cause(f"{path}.pattern", "FieldValueInvalid", f"Invalid value: {raw['pattern']!r}: {error}")
    for place, inner in _inner(raw, path):
        yield from problems(inner, place)


def _inner(raw: Raw, path: str) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema; what should hold some and does not is given out as it is, to be refused."""
    properties = raw.get("properties", {})
    if isinstance(properties, dict):
        yield from ((f"{path}.properties[{name}]", part) for name, part in properties.items())
    else:
        yield f"{path}.properties", properties
    for keyword in ("items", "not"):
        if keyword in raw:
            yield f"{path}.{keyword}", raw[keyword]
    if not isinstance(raw.get("additionalProperties", True), bool):
        yield f"{path}.additionalProperties", raw["additionalProperties"]
    for keyword in ("allOf", "anyOf", "oneOf"):
        parts = raw.get(keyword, [])
        if isinstance(parts, list):
            yield from ((f"{path}.{keyword}[{n}]", part) for n, part in enumerate(parts))
        else:
            yield f"{path}.{keyword}", parts
