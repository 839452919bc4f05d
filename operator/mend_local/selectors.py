"""Label and field selectors: parsed from a query, asked of objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mend_local.failures import bad_request

Object = dict[str, Any]
Predicate = Callable[[Object], bool]

_SET_BASED = re.compile(r"\s*([^\s!=,()]+)\s+(in|notin)\s*\(([^)]*)\)\s*")
_EQUALITY = re.compile(r"\s*([^\s!=,()]+)\s*(==|=|!=)\s*([^\s!=,()]*)\s*")
_EXISTENCE = re.compile(r"\s*(!?)\s*([^\s!=,()]+)\s*")
_FIELD = re.compile(r"\s*([\w./-]+)\s*(==|=|!=)\s*((?:[^,\\]|\\.)*)")

# What Kubernetes lets one select by, per resource; every resource knows its name and namespace.
FIELDS: dict[str, tuple[str, ...]] = {
    "pods": ("spec.nodeName", "status.phase", "spec.restartPolicy", "spec.serviceAccountName", "status.podIP"),
    "events": (
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
    "secrets": ("type",),
    "namespaces": ("status.phase",),
    "nodes": ("spec.unschedulable",),
}


def by_labels(text: str) -> Predicate | None:
    """A predicate for a labelSelector such as `app=x,tier in (a, b),!old`; None selects everything."""
    wanted: list[Predicate] = []
    rest = text
    while rest.strip():
        found, end = _label_requirement(rest)
        if end < len(rest) and rest[end] != ",":
            raise bad_request(f"unable to parse requirement: found '{rest[end:]}', expected: ',' or 'end of string'")
        wanted.append(found)
        rest = rest[end + 1 :]
    if not wanted:
        return None
    return lambda value: all(each(value["metadata"].get("labels") or {}) for each in wanted)


def _label_requirement(text: str) -> tuple[Predicate, int]:
    if match := _SET_BASED.match(text):
        key, operator, listed = match.groups()
        values = {value.strip() for value in listed.split(",")}
        if operator == "in":
            return (lambda labels: labels.get(key) in values), match.end()
        return (lambda labels: key not in labels or labels[key] not in values), match.end()
    if match := _EQUALITY.match(text):
        key, operator, value = match.groups()
        if operator == "!=":
            return (lambda labels: labels.get(key) != value), match.end()
        return (lambda labels: labels.get(key) == value), match.end()
    if match := _EXISTENCE.match(text):
        absent, key = match.groups()
        return (lambda labels: (key in labels) != bool(absent)), match.end()
    raise bad_request(f"unable to parse requirement: {text!r} is no label selector")


def by_fields(text: str, resource: str, kind: str) -> Predicate | None:
    """A predicate for a fieldSelector such as `metadata.name=x,status.phase!=Running`; None selects everything."""
    known = ("metadata.name", "metadata.namespace", *FIELDS.get(resource, ()))
    wanted: list[tuple[str, str, bool]] = []
    position = 0
    while position < len(text):
        match = _FIELD.match(text, position)
        if not match:
            raise bad_request(f"invalid field selector {text!r}: expected FIELD=VALUE or FIELD!=VALUE, comma-separated")
        field, operator, value = match.groups()
        if field not in known:
            raise bad_request(f"field label not supported: {field} (of {kind}; known are {', '.join(known)})")
        wanted.append((field, re.sub(r"\\(.)", r"\1", value), operator != "!="))
        position = match.end() + 1
    if not wanted:
        return None
    return lambda value: all((field_text(value, field) == text) is equal for field, text, equal in wanted)


def named(text: str) -> str:
    """The one name that a fieldSelector asks for, so that a watch of it can be authorised as that; else empty."""
    match = re.fullmatch(r"metadata\.name==?([^,!=]+)", text)
    return match[1] if match else ""


def field_text(value: Object, field: str) -> str:
    """A field as the text that selectors compare; an absent one is empty."""
    found: Any = value
    for part in field.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, dict):  # events: `source` selects by its component
        found = found.get("component")
    if isinstance(found, bool):
        return str(found).lower()
    return "" if found is None else str(found)
