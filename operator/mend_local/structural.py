"""Structural schemas at work: fields that a schema does not know are pruned, those that are absent are defaulted."""

from __future__ import annotations

import copy
from typing import Any

Raw = dict[str, Any]

_PRESERVE = "x-kubernetes-preserve-unknown-fields"
_EMBEDDED = "x-kubernetes-embedded-resource"
_OBJECT_META = ("apiVersion", "kind", "metadata")


def prune(value: Any, schema: Raw, *, root: bool = False) -> tuple[Any, list[str]]:
    """The value without the fields that the schema does not know, and their paths. Metadata is never touched."""
    unknown: list[str] = []
    return _pruned(value, schema, "", unknown, meta=root), unknown


def _pruned(value: Any, schema: Raw, path: str, unknown: list[str], *, meta: bool = False) -> Any:
    if isinstance(value, list):
        items = schema.get("items")
        if items is None:
            return value
        return [_pruned(each, items, f"{path}[{n}]", unknown) for n, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") or {}
    additional = schema.get("additionalProperties")
    keeps = schema.get(_PRESERVE, False) or additional is True
    meta = meta or schema.get(_EMBEDDED, False)
    kept = {}
    for name, inner in value.items():
        here = f"{path}.{name}" if path else name
        if meta and name in _OBJECT_META:
            kept[name] = inner
        elif name in properties:
            kept[name] = _pruned(inner, properties[name], here, unknown)
        elif isinstance(additional, dict):
            kept[name] = _pruned(inner, additional, here, unknown)
        elif keeps:
            kept[name] = inner
        else:
            unknown.append(here)
    return kept


def fill_defaults(value: Any, schema: Raw) -> Any:
    """The value with the schema's defaults in place of what is absent (or null where null is not allowed)."""
    if isinstance(value, list):
        items = schema.get("items")
        return [fill_defaults(each, items) for each in value] if items else value
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") or {}
    additional = schema.get("additionalProperties")
    filled = {}
    for name, inner in value.items():
        part = properties.get(name, additional if isinstance(additional, dict) else None)
        if part is None:
            filled[name] = inner
        elif inner is not None or part.get("nullable") or "default" not in part:
            filled[name] = fill_defaults(inner, part)
    for name, part in properties.items():
        if name not in filled and "default" in part:
            filled[name] = fill_defaults(copy.deepcopy(part["default"]), part)
    return filled
