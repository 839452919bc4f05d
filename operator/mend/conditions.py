"""Pure: the conditions in a run's status, as metav1.Condition has them."""

from __future__ import annotations

from msgspec.structs import replace

from mend.status import Condition, RunStatus

MESSAGE_LIMIT = 16_000  # the API allows 32 KiB; a traceback is the longest that is put there


def with_condition(status: RunStatus, kind: str, holds: bool, reason: str, message: str, now: float) -> RunStatus:
    """The status with this condition; its transition time moves only when it turns true or false."""
    word = "True" if holds else "False"
    old = next((each for each in status.conditions if each.type == kind), None)
    since = old.since if old is not None and old.status == word else now
    new = Condition(type=kind, status=word, reason=reason, message=message[:MESSAGE_LIMIT], since=since)
    if new == old:
        return status
    others = [each for each in status.conditions if each.type != kind]
    return replace(status, conditions=tuple(sorted([*others, new], key=lambda each: each.type)))


def without_condition(status: RunStatus, kind: str) -> RunStatus:
    """The status without this condition."""
    if all(each.type != kind for each in status.conditions):
        return status
    return replace(status, conditions=tuple(each for each in status.conditions if each.type != kind))
