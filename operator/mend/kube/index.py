"""A local copy of objects, found by name, by label and by the uid of their owner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from mend.kube.client import Json

T = TypeVar("T")
Key = tuple[str, str]  # namespace ("" for none), name


def key_of(obj: Json) -> Key:
    """Namespace and name."""
    meta = obj["metadata"]
    return meta.get("namespace") or "", meta["name"]


def uid_of(obj: Json) -> str:
    """The uid: equal names with different uids are different objects."""
    return str(obj["metadata"].get("uid") or "")


def version_of(obj: Json) -> str:
    """The resourceVersion: opaque, only to be compared for equality."""
    return str(obj["metadata"].get("resourceVersion") or "")


class Index:
    """Objects are shared, not copied: whoever reads one must not change it."""

    def __init__(self) -> None:
        self._objects: dict[Key, Json] = {}
        self._by_label: dict[tuple[str, str], dict[Key, None]] = {}
        self._by_owner: dict[str, dict[Key, None]] = {}

    def get(self, namespace: str, name: str) -> Json | None:
        """The object of this name."""
        return self._objects.get((namespace, name))

    def by_label(self, label: str, value: str, namespace: str | None = None) -> tuple[Json, ...]:
        """Objects that carry the label with this value, in no particular order."""
        keys = self._by_label.get((label, value), {})
        return tuple(self._objects[key] for key in keys if namespace is None or key[0] == namespace)

    def by_owner(self, uid: str) -> tuple[Json, ...]:
        """Objects with an owner reference to this uid, in no particular order."""
        return tuple(self._objects[key] for key in self._by_owner.get(uid, {}))

    def values(self) -> tuple[Json, ...]:
        """All objects."""
        return tuple(self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Json]:
        return iter(self.values())

    def put(self, obj: Json) -> None:
        """Adds or replaces. `managedFields`, often half of an object, are dropped."""
        obj["metadata"].pop("managedFields", None)
        key = key_of(obj)
        self.remove(*key)
        self._objects[key] = obj
        for label in _labels(obj):
            self._by_label.setdefault(label, {})[key] = None
        for uid in _owners(obj):
            self._by_owner.setdefault(uid, {})[key] = None

    def remove(self, namespace: str, name: str) -> Json | None:
        """Takes the object out and hands it over, if it was there."""
        key = (namespace, name)
        obj = self._objects.pop(key, None)
        if obj is not None:
            for label in _labels(obj):
                _discard(self._by_label, label, key)
            for uid in _owners(obj):
                _discard(self._by_owner, uid, key)
        return obj


def _labels(obj: Json) -> tuple[tuple[str, str], ...]:
    return tuple((obj["metadata"].get("labels") or {}).items())


def _owners(obj: Json) -> tuple[str, ...]:
    return tuple(str(owner.get("uid")) for owner in obj["metadata"].get("ownerReferences") or ())


def _discard(index: dict[T, dict[Key, None]], at: T, key: Key) -> None:
    keys = index.get(at)
    if keys is not None:
        keys.pop(key, None)
        if not keys:
            del index[at]
