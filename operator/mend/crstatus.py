"""Pure: a run's status between the facts in memory and the JSON in the custom resource.

In the resource, times are RFC 3339 as everywhere in Kubernetes; in memory they are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from mend.status import RunStatus

SHOWN_ALWAYS = ("phase", "attempt", "step", "recoveries")  # printer columns want these even when they are defaults


class UnreadableStatus(ValueError):
    """The status in the custom resource is not one that mend wrote."""


def to_resource(status: RunStatus) -> dict[str, Any]:
    """The `status` to put into the custom resource."""
    raw: dict[str, Any] = _walked(msgspec.to_builtins(status), _timestamp)
    raw |= {name: getattr(status, name) for name in SHOWN_ALWAYS}
    for condition in raw.get("conditions", ()):
        condition["lastTransitionTime"] = _timestamp(condition.pop("since", 0.0))
        condition["observedGeneration"] = status.observed_generation
    return raw


def from_resource(raw: Any) -> RunStatus:
    """The status found in a custom resource; none is a fresh one. Raises `UnreadableStatus`."""
    try:
        plain = _walked(raw or {}, _seconds)
        for condition in plain.get("conditions", ()):
            condition["since"] = _seconds(condition.pop("lastTransitionTime", "1970-01-01T00:00:00Z"))
            condition.pop("observedGeneration", None)
        return msgspec.convert(plain, RunStatus)
    except (msgspec.ValidationError, AttributeError, TypeError, ValueError) as error:
        remedy = "if a newer mend wrote it, run that one again; else delete the status or restore it from a backup"
        raise UnreadableStatus(f"status: {error}; {remedy}") from error


def _walked(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A deep copy in which `convert` was applied to every field whose name ends in At."""
    if isinstance(value, dict):
        return {
            key: convert(item) if key.endswith("At") and item is not None else _walked(item, convert)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_walked(item, convert) for item in value]
    return value


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
