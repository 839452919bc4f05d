"""Whose a prefix of the store is: an object at its root names the run, and counts only once it was read back."""

from __future__ import annotations

import contextlib
import re
from itertools import islice
from typing import ClassVar, Final

import msgspec

from mend.keys import ANNOUNCEMENTS_FOLDER, INCIDENTS_FOLDER, OWNER_KEY, TOKENIZERS_FOLDER
from mend.protocol import Message
from mend.store import AlreadyExists, NotFound, Store, StoreError

_LOOKED_AT: Final = 1000  # keys at the most: as many as a store lists at once
# What a prefix may hold before it is claimed: a run that no controller looked after may have saved there.
_MENDS: Final = re.compile(
    rf"step-\d{{12}}/|({ANNOUNCEMENTS_FOLDER}|{INCIDENTS_FOLDER}|{TOKENIZERS_FOLDER})/|{OWNER_KEY}$|\.|lost\+found/"
)


class Owner(Message, frozen=True, kw_only=True):
    """The run that a prefix belongs to. It names no cluster: a run may move, its name and prefix move with it."""

    namespace: str
    name: str
    uid: str


class PrefixOwned(StoreError):
    """The prefix belongs to another run."""

    reason: ClassVar[str] = "PrefixOwned"
    remedy: ClassVar[str] = "give each run a prefix of its own in spec.checkpoint.uri"


class PrefixInUse(StoreError):
    """The prefix belongs to no run and holds something that is not mend's."""

    reason: ClassVar[str] = "PrefixInUse"
    remedy: ClassVar[str] = "name an empty prefix in spec.checkpoint.uri"


def claim(store: Store, owner: Owner) -> None:
    """Make the prefix this run's, or find that it is; raises `PrefixOwned` or `PrefixInUse` if it cannot be.

    A run of the same name and another uid is the same run made anew: it takes the prefix over.
    """
    found = owner_of(store)
    if found is None:
        _refuse_what_is_not_mends(store)
        with contextlib.suppress(AlreadyExists):  # whose it is shows below
            store.put_if_absent(OWNER_KEY, msgspec.json.encode(owner))
        found = owner_of(store)
    if found is not None and found != owner and (found.namespace, found.name) == (owner.namespace, owner.name):
        store.put(OWNER_KEY, msgspec.json.encode(owner))
        found = owner_of(store)
    # Read back even after a conditional write: a store that ignores the condition lets the last writer win.
    if found != owner:
        by = f"run {found.namespace}/{found.name} (uid {found.uid})" if found else "nobody, although it was claimed"
        remedy = f"{PrefixOwned.remedy}; if that run is gone for good, delete {OWNER_KEY} there"
        raise PrefixOwned(store.uri, f"it is owned by {by}", remedy=remedy)


def owner_of(store: Store) -> Owner | None:
    """The run that it belongs to, if any; raises `PrefixOwned` if that cannot be read: it is somebody else's."""
    try:
        raw = store.get(OWNER_KEY)
    except NotFound:
        return None
    try:
        return msgspec.json.decode(raw, type=Owner)
    except msgspec.MsgspecError as error:
        where = f"{store.uri}/{OWNER_KEY}"
        raise PrefixOwned(where, f"is not mend's: {error}; the prefix holds something else") from error


def _refuse_what_is_not_mends(store: Store) -> None:
    """A prefix that nobody has claimed and that holds other things is more likely a slip than meant."""
    for entry in islice(store.list("", delimiter="/"), _LOOKED_AT):
        if not _MENDS.match(entry.key):
            raise PrefixInUse(store.uri, f"holds {entry.key!r}, which mend has not written")
