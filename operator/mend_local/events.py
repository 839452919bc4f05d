"""Events have two faces, v1 and events.k8s.io/v1, over one stored object (the v1 one)."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

_NEW_TO_OLD = {
    "regarding": "involvedObject",
    "note": "message",
    "reportingController": "reportingComponent",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
}
_OLD_TO_NEW = {old: new for new, old in _NEW_TO_OLD.items()}


def to_stored(value: Object) -> Object:
    """An events.k8s.io/v1 Event as the v1 Event that is stored."""
    return {**{_NEW_TO_OLD.get(name, name): part for name, part in value.items()}, "apiVersion": "v1"}


def from_stored(value: Object) -> Object:
    """A stored v1 Event as events.k8s.io/v1 shows it."""
    return {**{_OLD_TO_NEW.get(name, name): part for name, part in value.items()}, "apiVersion": "events.k8s.io/v1"}
