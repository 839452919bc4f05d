"""Checks a value against an OpenAPI v3 schema and names every bad field as the Kubernetes API server does."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from mend_local.failures import Cause

Raw = dict[str, Any]

_INT_OR_STRING = "x-kubernetes-int-or-string"
_GO_DURATION = re.compile(
    r"[-+]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h|d|w)(\s*(\d+(\.\d*)?)(ns|us|µs|ms|s|m|h|d|w))*|0"
)


def validate(value: Any, schema: Raw, path: str = "") -> Iterator[Cause]:
    """Every violation, depth first. An empty path is the whole object."""
    if value is None and schema.get("nullable"):
        return
    problem = _type_problem(value, schema, path)
    if problem:
        yield problem
        return
    yield from _enum(value, schema, path)
    match value:
        case bool() | None:
            pass
        case str():
            yield from _text(value, schema, path)
        case int() | float():
            yield from _number(value, schema, path)
        case list():
            yield from _list(value, schema, path)
        case dict():
            yield from _object(value, schema, path)
    yield from _combined(value, schema, path)


def shown(value: Any) -> str:
    """A value as it appears in an error."""
    return json.dumps(value, ensure_ascii=False)


def wrong(path: str, value: Any, detail: str) -> Cause:
    """An 'Invalid value' cause; objects and lists are named by their type, as Kubernetes does."""
    told = '"object"' if isinstance(value, dict) else '"array"' if isinstance(value, list) else shown(value)
    return Cause(path or "<nil>", "FieldValueInvalid", f"Invalid value: {told}: {detail}")


def _in_body(path: str) -> str:
    return f"{path} in body"


def _type_problem(value: Any, schema: Raw, path: str) -> Cause | None:
    if schema.get(_INT_OR_STRING):
        if isinstance(value, str) or _is_integer(value):
            return None
        return _type_cause(value, path, "integer,string")
    wanted = schema.get("type")
    if wanted is None or _TYPES[wanted](value):
        return None
    return _type_cause(value, path, wanted)


def _type_cause(value: Any, path: str, wanted: str) -> Cause:
    name = _type_name(value)
    detail = f'Invalid value: "{name}": {_in_body(path)} must be of type {wanted}: "{name}"'
    return Cause(path or "<nil>", "FieldValueTypeInvalid", detail)


def _type_name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "number"
        case list():
            return "array"
        case _:
            return "object"


def _is_integer(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": _is_integer,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


def _enum(value: Any, schema: Raw, path: str) -> Iterator[Cause]:
    allowed = schema.get("enum")
    if allowed is not None and value not in allowed:
        listed = ", ".join(shown(each) for each in allowed)
        detail = f"Unsupported value: {shown(value)}: supported values: {listed}"
        yield Cause(path, "FieldValueNotSupported", detail)


def _text(value: str, schema: Raw, path: str) -> Iterator[Cause]:
    if len(value) < schema.get("minLength", 0):
        yield wrong(path, value, f"{_in_body(path)} should be at least {schema['minLength']} chars long")
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        limit = schema["maxLength"]
        yield Cause(path, "FieldValueTooLong", f"Too long: may not be more than {limit} bytes")
    pattern = schema.get("pattern")
    if pattern and not re.search(pattern, value):
        yield wrong(path, value, f"{_in_body(path)} should match '{pattern}'")
    check = _FORMATS.get(schema.get("format", ""))
    if check and not check(value):
        yield wrong(path, value, f"{_in_body(path)} must be of type {schema['format']}: {shown(value)}")


def _number(value: float, schema: Raw, path: str) -> Iterator[Cause]:
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    if lowest is not None:
        if schema.get("exclusiveMinimum") and value <= lowest:
            yield wrong(path, value, f"{_in_body(path)} should be greater than {lowest}")
        elif value < lowest:
            yield wrong(path, value, f"{_in_body(path)} should be greater than or equal to {lowest}")
    if highest is not None:
        if schema.get("exclusiveMaximum") and value >= highest:
            yield wrong(path, value, f"{_in_body(path)} should be less than {highest}")
        elif value > highest:
            yield wrong(path, value, f"{_in_body(path)} should be less than or equal to {highest}")
    step = schema.get("multipleOf")
    if step and value % step:
        yield wrong(path, value, f"{_in_body(path)} should be a multiple of {step}")
    bits = {"int32": 31, "int64": 63}.get(schema.get("format", ""))
    if bits and not -(2**bits) <= value < 2**bits:
        yield wrong(path, value, f"{_in_body(path)} must be of type {schema['format']}: {shown(value)}")


def _list(value: list[Any], schema: Raw, path: str) -> Iterator[Cause]:
    if len(value) < schema.get("minItems", 0):
        yield wrong(path, value, f"{_in_body(path)} should have at least {schema['minItems']} items")
    if "maxItems" in schema and len(value) > schema["maxItems"]:
        limit = schema["maxItems"]
        yield Cause(path, "FieldValueTooMany", f"Too many: {len(value)}: must have at most {limit} items")
    yield from _duplicates(value, schema, path)
    for number, each in enumerate(value):
        if "items" in schema:
            yield from validate(each, schema["items"], f"{path}[{number}]")


def _duplicates(value: list[Any], schema: Raw, path: str) -> Iterator[Cause]:
    """Lists of type set or map hold each item, or each combination of its keys, once."""
    kind = schema.get("x-kubernetes-list-type")
    if kind == "map":
        names = schema.get("x-kubernetes-list-map-keys") or []
        keys = [{name: each.get(name) for name in names} if isinstance(each, dict) else each for each in value]
    elif kind == "set" or schema.get("uniqueItems"):
        keys = value
    else:
        return
    seen: set[str] = set()
    for number, key in enumerate(keys):
        text = json.dumps(key, sort_keys=True)
        if text in seen:
            yield Cause(f"{path}[{number}]", "FieldValueDuplicate", f"Duplicate value: {shown(key)}")
        seen.add(text)


def _object(value: Raw, schema: Raw, path: str) -> Iterator[Cause]:
    for name in schema.get("required") or ():
        if name not in value:
            yield Cause(_join(path, name), "FieldValueRequired", "Required value")
    if len(value) < schema.get("minProperties", 0):
        yield wrong(path, value, f"{_in_body(path)} should have at least {schema['minProperties']} properties")
    if "maxProperties" in schema and len(value) > schema["maxProperties"]:
        yield wrong(path, value, f"{_in_body(path)} should have at most {schema['maxProperties']} properties")
    properties = schema.get("properties") or {}
    additional = schema.get("additionalProperties")
    for name, inner in value.items():
        part = properties.get(name, additional)
        if isinstance(part, dict):
            yield from validate(inner, part, _join(path, name))


def _combined(value: Any, schema: Raw, path: str) -> Iterator[Cause]:
    for part in schema.get("allOf") or ():
        yield from validate(value, part, path)
    choices = schema.get("anyOf") or ()
    if choices and not schema.get(_INT_OR_STRING) and not any(_holds(value, part, path) for part in choices):
        yield wrong(path, value, f"{_in_body(path)} must validate at least one schema (anyOf)")
    choices = schema.get("oneOf") or ()
    if choices and sum(_holds(value, part, path) for part in choices) != 1:
        yield wrong(path, value, f"{_in_body(path)} must validate one and only one schema (oneOf)")
    if "not" in schema and _holds(value, schema["not"], path):
        yield wrong(path, value, f"{_in_body(path)} must not validate the schema (not)")


def _holds(value: Any, schema: Raw, path: str) -> bool:
    return next(validate(value, schema, path), None) is None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parses(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    def check(value: str) -> bool:
        try:
            parse(value)
        except ValueError:
            return False
        return True

    return check


_FORMATS: dict[str, Callable[[str], bool]] = {
    "date-time": _parses(datetime.fromisoformat),
    "date": _parses(lambda text: datetime.strptime(text, "%Y-%m-%d")),  # noqa: DTZ007 - only whether it parses
    "duration": lambda text: bool(_GO_DURATION.fullmatch(text)),
    "ipv4": _parses(ipaddress.IPv4Address),
    "ipv6": _parses(ipaddress.IPv6Address),
    "cidr": _parses(lambda text: ipaddress.ip_network(text, strict=False)),
    "uri": lambda text: bool(urlsplit(text).scheme),
    "uuid": lambda text: bool(re.fullmatch(r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}", text)),
    "byte": lambda text: bool(re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", text)) and len(text) % 4 == 0,
}
