"""Watching: the changes after a version as a stream of JSON lines, with bookmarks, until time is up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from mend_local import failures
from mend_local.faults import Misbehaviour
from mend_local.lists import Selection
from mend_local.objects import present
from mend_local.resources import ResourceType
from mend_local.storage import Change, ChangeKind, HistoryGone, Storage

Object = dict[str, Any]

BOOKMARK_EVERY_SECONDS = 10.0
DEFAULT_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    """What to watch. `since` None: first what is there now, then what changes."""

    kind: ResourceType
    chosen: Selection
    since: int | None
    bookmarks: bool
    timeout_seconds: float
    shape: Callable[[Object], Object]  # the object as it is asked for: whole, as a Table, its metadata only


async def stream(storage: Storage, misbehaviour: Misbehaviour, asked: WatchRequest) -> AsyncIterator[list[Object]]:
    """Batches of watch events, never empty; ends when the time is up or the history is gone."""
    resource = asked.kind.storage_name
    clock = asyncio.get_running_loop()
    deadline = clock.time() + asked.timeout_seconds
    if asked.since is None:
        position = bookmarked = storage.version
        present_now = [value for value in storage.every(resource, asked.chosen.namespace) if asked.chosen.takes(value)]
        if present_now:
            yield [_event(asked, "ADDED", value) for value in present_now]
    else:
        position = bookmarked = asked.since
    idle = False
    while True:
        await misbehaviour.thawed()
        try:
            changes = storage.changes_after(resource, position)
        except HistoryGone as gone:
            yield [{"type": "ERROR", "object": failures.expired(str(gone)).body}]
            return
        if changes:
            idle = False
            position = changes[-1].version
            if batch := [event for change in changes for event in _seen(asked, change)]:
                bookmarked = position
                yield batch
            continue
        if idle:
            # Nothing has happened to this resource up to now, so its watchers may resume from the newest version.
            position = storage.version
            if asked.bookmarks and position > bookmarked:
                bookmarked = position
                yield [_bookmark(asked, position)]
        left = deadline - clock.time()
        if left <= 0:
            return
        idle = not await storage.changed(resource, position, min(left, BOOKMARK_EVERY_SECONDS))


def _seen(asked: WatchRequest, change: Change) -> list[Object]:
    """The change as a watcher of a selection sees it: objects appear and vanish as they begin and cease to match."""
    before = asked.chosen.takes(change.previous)
    now = change.kind is not ChangeKind.DELETED and asked.chosen.takes(change.object)
    if now:
        return [_event(asked, "MODIFIED" if before else "ADDED", change.object)]
    if not before or change.previous is None:
        return []
    version = change.object["metadata"]["resourceVersion"]
    last = {**change.previous, "metadata": {**change.previous["metadata"], "resourceVersion": version}}
    return [_event(asked, "DELETED", last)]


def _event(asked: WatchRequest, kind: str, value: Object) -> Object:
    return {"type": kind, "object": asked.shape(present(asked.kind, value))}


def _bookmark(asked: WatchRequest, version: int) -> Object:
    value = {
        "kind": asked.kind.kind,
        "apiVersion": asked.kind.api_version,
        "metadata": {"resourceVersion": str(version), "creationTimestamp": None},
    }
    return {"type": "BOOKMARK", "object": value}
