"""Objects in memory: one version counter, a bounded history per resource for watches, and a log that outlives us.

Stored objects are never changed in place; whoever gets one treats it as frozen and writes a new one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mend_local.changelog import ChangeLog, Entry

Object = dict[str, Any]
Key = tuple[str, str]  # namespace ("" for cluster-scoped), name
HISTORY_PER_RESOURCE = 2000
VERSIONS_SKIPPED_BY_A_RESTART = 1000
_ANYTHING = ""


class ChangeKind(StrEnum):
    """What happened to an object, in the words of a watch."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True)
class Change:
    """One write: the object after it (for a deletion: as it was last) and before it."""

    version: int
    kind: ChangeKind
    key: Key
    object: Object
    previous: Object | None


class HistoryGone(LookupError):
    """The asked-for version is older than the history kept."""

    def __init__(self, asked: int, oldest: int) -> None:
        super().__init__(f"too old resource version: {asked} ({oldest})")
        self.asked = asked
        self.oldest = oldest


@dataclass(slots=True)
class _Shelf:
    """All objects of one resource type and what happened to them lately."""

    objects: dict[Key, Object]
    history: deque[Change]
    gone_up_to: int  # changes of this version and before are no longer in the history


class Storage:
    """Every object of the cluster. All methods are atomic: none of them awaits between reading and writing."""

    def __init__(self, log: ChangeLog | None = None, *, history: int = HISTORY_PER_RESOURCE) -> None:
        self.version = 1
        self._compacted_at = 0
        self._lost: range = range(0)
        self._log = log
        self._history = history
        self._shelves: dict[str, _Shelf] = {}
        self._waiters: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        if log is not None:
            self._replay(log)

    def close(self) -> None:
        """Write what is left and let go of the log."""
        if self._log is not None:
            self._log.close()

    # ---------------------------------------------------------------- reading
    def get(self, resource: str, key: Key) -> Object | None:
        """The object, or None."""
        shelf = self._shelves.get(resource)
        return shelf.objects.get(key) if shelf else None

    def every(self, resource: str, namespace: str = "") -> list[Object]:
        """All objects of a resource (of one namespace, if given) in the order of their keys."""
        shelf = self._shelves.get(resource)
        return _sorted(shelf.objects, namespace) if shelf else []

    def every_at(self, resource: str, namespace: str, version: int) -> list[Object]:
        """The list as it was at `version`, so that the pages of one listing fit together; raises `HistoryGone`."""
        shelf = self._shelf(resource)
        self._check_kept(shelf, version)
        objects = dict(shelf.objects)
        for change in reversed(shelf.history):
            if change.version <= version:
                break
            if change.previous is None:
                objects.pop(change.key, None)
            else:
                objects[change.key] = change.previous
        return _sorted(objects, namespace)

    def resources(self) -> list[str]:
        """Every resource that has objects."""
        return [name for name, shelf in self._shelves.items() if shelf.objects]

    def everything(self) -> Iterator[tuple[str, Key, Object]]:
        """Every object with its resource and key."""
        for resource, shelf in self._shelves.items():
            for key, value in shelf.objects.items():
                yield resource, key, value

    # ---------------------------------------------------------------- writing
    def put(self, resource: str, key: Key, value: Object) -> Object:
        """Store `value` (created or changed) under the next version and return it with that version in its metadata."""
        shelf = self._shelf(resource)
        previous = shelf.objects.get(key)
        kind = ChangeKind.ADDED if previous is None else ChangeKind.MODIFIED
        return self._commit(resource, shelf, kind, key, value, previous)

    def delete(self, resource: str, key: Key) -> Object:
        """Remove an object and return its last state with the version of the deletion; raises KeyError."""
        shelf = self._shelf(resource)
        previous = shelf.objects[key]
        return self._commit(resource, shelf, ChangeKind.DELETED, key, previous, previous)

    # ---------------------------------------------------------------- watching
    def changes_after(self, resource: str, version: int) -> list[Change]:
        """What happened to a resource after `version`, oldest first; raises `HistoryGone`."""
        shelf = self._shelf(resource)
        self._check_kept(shelf, version)
        recent = list(itertools.takewhile(lambda change: change.version > version, reversed(shelf.history)))
        recent.reverse()
        return recent

    async def changed(self, resource: str, version: int, timeout: float | None) -> bool:
        """Wait until the resource has a change after `version`; False when the time is over first."""
        shelf = self._shelf(resource)
        if (shelf.history and shelf.history[-1].version > version) or shelf.gone_up_to > version:
            return True
        return await self._wait(resource, timeout)

    async def anything_changed(self, version: int, timeout: float | None) -> bool:
        """Wait until there is any change after `version`; False when the time is over first."""
        return self.version > version or await self._wait(_ANYTHING, timeout)

    async def _wait(self, resource: str, timeout: float | None) -> bool:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[resource].add(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiters[resource].discard(waiter)
        return True

    def forget_history(self) -> None:
        """Drop all history, as etcd's compaction does: watches from an older version now get 410."""
        self._compacted_at = self.version
        for shelf in self._shelves.values():
            shelf.history.clear()
            shelf.gone_up_to = self.version
        for resource in tuple(self._waiters):
            self._wake(resource)

    # ---------------------------------------------------------------- inside
    def _check_kept(self, shelf: _Shelf, version: int) -> None:
        if version < shelf.gone_up_to or version in self._lost:
            raise HistoryGone(version, max(shelf.gone_up_to, self._lost.stop))

    def _shelf(self, resource: str) -> _Shelf:
        if resource not in self._shelves:
            self._shelves[resource] = _Shelf({}, deque(), self._compacted_at)
        return self._shelves[resource]

    def _commit(
        self, resource: str, shelf: _Shelf, kind: ChangeKind, key: Key, value: Object, previous: Object | None
    ) -> Object:
        self.version += 1
        stamped = {**value, "metadata": {**value["metadata"], "resourceVersion": str(self.version)}}
        if self._log is not None:
            self._log.append(Entry(self.version, resource, key, None if kind is ChangeKind.DELETED else stamped))
        self._apply(shelf, Change(self.version, kind, key, stamped, previous))
        if self._log is not None and self._log.wants_compaction:
            self._log.compact(self.version, self._entries())
        self._wake(resource)
        self._wake(_ANYTHING)
        return stamped

    def _wake(self, resource: str) -> None:
        for waiter in self._waiters.pop(resource, ()):
            if not waiter.done():
                waiter.set_result(None)

    def _apply(self, shelf: _Shelf, change: Change) -> None:
        if change.kind is ChangeKind.DELETED:
            shelf.objects.pop(change.key, None)
        else:
            shelf.objects[change.key] = change.object
        shelf.history.append(change)
        if len(shelf.history) > self._history:
            shelf.gone_up_to = shelf.history.popleft().version

    def _entries(self) -> Iterable[Entry]:
        return (
            Entry(int(value["metadata"]["resourceVersion"]), resource, key, value)
            for resource, key, value in self.everything()
        )

    def _replay(self, log: ChangeLog) -> None:
        """Load the compacted part as it is and the rest as changes, so that watches go on across a restart."""
        compacted_at, entries = log.load()
        self._compacted_at = compacted_at
        self.version = max(self.version, compacted_at)
        for entry in entries:
            shelf = self._shelf(entry.resource)
            previous = shelf.objects.get(entry.key)
            if entry.version <= compacted_at and entry.value is not None:
                shelf.objects[entry.key] = entry.value
                continue
            self.version = max(self.version, entry.version)
            if entry.value is not None:
                kind = ChangeKind.ADDED if previous is None else ChangeKind.MODIFIED
                self._apply(shelf, Change(entry.version, kind, entry.key, entry.value, previous))
            elif previous is not None:
                last = {**previous, "metadata": {**previous["metadata"], "resourceVersion": str(entry.version)}}
                self._apply(shelf, Change(entry.version, ChangeKind.DELETED, entry.key, last, previous))
        if entries:
            self._skip_versions()

    def _skip_versions(self) -> None:
        """Never give out a version twice: the last life may have told clients of writes that did not reach the disk.

        Whoever comes back with one of those versions has seen what is not so, and must list again.
        """
        last = self.version
        self.version += VERSIONS_SKIPPED_BY_A_RESTART
        self._lost = range(last + 1, self.version)


def _sorted(objects: dict[Key, Object], namespace: str) -> list[Object]:
    return [objects[key] for key in sorted(objects) if not namespace or key[0] == namespace]
