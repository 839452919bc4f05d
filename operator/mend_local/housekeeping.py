"""What a cluster does on its own: collects garbage, empties namespaces, ends definitions, forgets old events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from mend_local.definitions import CLEANUP_FINALIZER
from mend_local.failures import ApiFailure
from mend_local.objects import FOREGROUND, ORPHAN, PERMANENT_NAMESPACES, DeleteOptions, Objects, WriteOptions
from mend_local.resources import ResourceType
from mend_local.storage import Key
from mend_local.times import parse

Object = dict[str, Any]
log = logging.getLogger(__name__)

EVENT_LIFE = timedelta(hours=1)
MAX_EVENTS = 2000
_SWEEP_SECONDS = 60.0
_GATHER_SECONDS = 0.03  # a burst of changes is looked at once
_CRD = "customresourcedefinitions.apiextensions.k8s.io"


class Housekeeping:
    """Level-triggered: after any change, looks at everything there is and does what is still to be done."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._storage = objects.storage
        self._task: asyncio.Task[None] | None = None
        self._next_sweep = datetime.min.replace(tzinfo=UTC)

    def prepare(self) -> None:
        """Make the namespaces that every cluster has."""
        namespaces = self._type("v1", "Namespace")
        for name in PERMANENT_NAMESPACES:
            if self._storage.get("namespaces", ("", name)) is None:
                self._objects.create(namespaces, "", {"metadata": {"name": name}}, WriteOptions())

    def start(self) -> None:
        """Prepare the cluster and look after it from now on."""
        self.prepare()
        self._task = asyncio.create_task(self._run(), name="housekeeping")
        self._task.add_done_callback(_tell_end)

    async def stop(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            seen = self._storage.version
            self.tidy()
            await self._storage.anything_changed(seen, _SWEEP_SECONDS)
            await asyncio.sleep(_GATHER_SECONDS)

    def tidy(self) -> None:
        """One look at everything."""
        self._make_service_accounts()
        self._collect_garbage()
        self._empty_namespaces()
        self._end_definitions()
        self._forget_events(datetime.now(UTC))

    # ---------------------------------------------------------------- service accounts
    def _make_service_accounts(self) -> None:
        """Every namespace has a service account `default`."""
        for namespace in self._storage.every("namespaces"):
            name = namespace["metadata"]["name"]
            missing = self._storage.get("serviceaccounts", (name, "default")) is None
            if missing and not namespace["metadata"].get("deletionTimestamp"):
                account = self._type("v1", "ServiceAccount")
                self._objects.create(account, name, {"metadata": {"name": "default"}}, WriteOptions())

    # ---------------------------------------------------------------- garbage
    def _collect_garbage(self) -> None:
        """Delete what has outlived its owners, and let owners go that waited for their dependents."""
        everything = [entry for entry in self._storage.everything() if entry[0] != "events"]
        owners = {value["metadata"]["uid"]: value for _, _, value in everything}
        dependents: dict[str, list[Object]] = {}
        for _, _, value in everything:
            for reference in value["metadata"].get("ownerReferences") or ():
                dependents.setdefault(reference["uid"], []).append(value)
        for _, _, value in everything:
            if value["metadata"].get("ownerReferences"):
                self._look_after(value, owners)
            if value["metadata"].get("deletionTimestamp"):
                self._release_owner(value, dependents.get(value["metadata"]["uid"], []))

    def _look_after(self, value: Object, owners: dict[str, Object]) -> None:
        metadata = value["metadata"]
        references = metadata["ownerReferences"]
        kept = [reference for reference in references if self._has_owner(value, reference, owners)]
        waiting = [reference for reference in kept if _waits_for_dependents(owners.get(reference["uid"]))]
        if len(waiting) == len(kept):
            if not metadata.get("deletionTimestamp"):
                self._delete(value, propagation="Foreground" if waiting else "Background")
        elif len(kept) < len(references):
            self._edit(value, lambda found: {**found, "metadata": {**found["metadata"], "ownerReferences": kept}})

    def _has_owner(self, value: Object, reference: Object, owners: dict[str, Object]) -> bool:
        """An owner of a kind that nobody serves cannot be looked up, so it is not held to be gone."""
        owner = owners.get(reference["uid"])
        if owner is None:
            kind = self._objects.registry.by_kind(reference.get("apiVersion", ""), reference.get("kind", ""))
            return kind is None
        return owner["metadata"].get("namespace", "") in ("", value["metadata"].get("namespace", ""))

    def _release_owner(self, owner: Object, dependents: list[Object]) -> None:
        finalizers = owner["metadata"].get("finalizers") or []
        if ORPHAN in finalizers:
            uid = owner["metadata"]["uid"]
            for value in dependents:
                self._edit(value, lambda found: _without_owner(found, uid))
            self._edit(owner, lambda found: _without_finalizer(found, ORPHAN))
        elif FOREGROUND in finalizers and not any(_blocks(value, owner) for value in dependents):
            self._edit(owner, lambda found: _without_finalizer(found, FOREGROUND))

    # ---------------------------------------------------------------- namespaces and definitions that end
    def _empty_namespaces(self) -> None:
        for namespace in self._storage.every("namespaces"):
            if not namespace["metadata"].get("deletionTimestamp"):
                continue
            name = namespace["metadata"]["name"]
            left = [value for _, key, value in tuple(self._storage.everything()) if key[0] == name]
            for value in left:
                if not value["metadata"].get("deletionTimestamp"):
                    self._delete(value)
            if not any(key[0] == name for _, key, _ in self._storage.everything()):
                self._objects.settle(self._type("v1", "Namespace"), {**namespace, "spec": {}})

    def _end_definitions(self) -> None:
        """A definition waits until the last of its objects is gone."""
        for definition in self._storage.every(_CRD):
            metadata = definition["metadata"]
            if not metadata.get("deletionTimestamp") or CLEANUP_FINALIZER not in metadata.get("finalizers", ()):
                continue
            left = self._storage.every(metadata["name"])
            for value in left:
                if not value["metadata"].get("deletionTimestamp"):
                    self._delete(value)
            if not self._storage.every(metadata["name"]):
                self._edit(definition, lambda found: _without_finalizer(found, CLEANUP_FINALIZER))

    # ---------------------------------------------------------------- events
    def _forget_events(self, now: datetime) -> None:
        """Events live for an hour, and the oldest make room when there are too many."""
        count = len(self._storage.every("events"))
        if count <= MAX_EVENTS and now < self._next_sweep:
            return
        self._next_sweep = now + timedelta(seconds=_SWEEP_SECONDS)
        by_age = sorted(self._storage.every("events"), key=lambda event: int(event["metadata"]["resourceVersion"]))
        surplus = max(0, len(by_age) - MAX_EVENTS)
        for number, event in enumerate(by_age):
            written = parse(event["metadata"]["creationTimestamp"])
            latest = parse(event.get("lastTimestamp") or "") or written
            if number < surplus or (latest is not None and now - latest > EVENT_LIFE):
                self._storage.delete("events", (event["metadata"]["namespace"], event["metadata"]["name"]))

    # ---------------------------------------------------------------- small helpers
    def _type(self, api_version: str, kind: str) -> ResourceType:
        found = self._objects.registry.by_kind(api_version, kind)
        if found is None:
            raise LookupError(f"{kind} of {api_version} is not served")
        return found

    def _delete(self, value: Object, propagation: str = "Background") -> None:
        kind, (namespace, name) = self._place(value)
        if kind is not None:
            self._try(lambda: self._objects.delete(kind, namespace, name, DeleteOptions(propagation=propagation)))

    def _edit(self, value: Object, change: Any) -> None:
        kind, (namespace, name) = self._place(value)
        if kind is not None:
            self._try(lambda: self._objects.patch(kind, namespace, name, change, WriteOptions()))

    def _place(self, value: Object) -> tuple[ResourceType | None, Key]:
        kind = self._objects.registry.by_kind(value["apiVersion"], value["kind"])
        return kind, (value["metadata"].get("namespace", ""), value["metadata"]["name"])

    @staticmethod
    def _try(action: Any) -> None:
        """Do it unless the object has gone or become invalid meanwhile; the next look sees what is left to do."""
        try:
            action()
        except ApiFailure as failure:
            if failure.code != 404:
                log.warning("housekeeping could not finish: %s", failure.message)


def _tell_end(task: asyncio.Task[None]) -> None:
    """Housekeeping that has died must not go unnoticed until somebody waits for a namespace to end."""
    if not task.cancelled() and (error := task.exception()):
        log.critical("housekeeping has ended: nothing is collected any more", exc_info=error)


def _waits_for_dependents(owner: Object | None) -> bool:
    if owner is None:
        return False
    metadata = owner["metadata"]
    return bool(metadata.get("deletionTimestamp")) and FOREGROUND in (metadata.get("finalizers") or ())


def _blocks(value: Object, owner: Object) -> bool:
    references = value["metadata"].get("ownerReferences") or ()
    return any(each["uid"] == owner["metadata"]["uid"] and each.get("blockOwnerDeletion") for each in references)


def _without_owner(value: Object, uid: str) -> Object:
    kept = [each for each in value["metadata"].get("ownerReferences") or () if each["uid"] != uid]
    return {**value, "metadata": {**value["metadata"], "ownerReferences": kept}}


def _without_finalizer(value: Object, finalizer: str) -> Object:
    kept = [each for each in value["metadata"].get("finalizers") or () if each != finalizer]
    return {**value, "metadata": {**value["metadata"], "finalizers": kept}}
