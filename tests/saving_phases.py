"""How far saving and restoring had come at the moment of a fault: a word for what was seen of them then.

Pure; `saving_gang.py` looks. A look takes some 0.1 ms, so what passed within it is told by either of its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from mend.heartbeats import Phase
from mend.keys import DCP_METADATA_NAME, MANIFEST_NAME, share_name
from reached import State


class SavePhase(StrEnum):
    """Where a gang is between two states that it can restore, in the order in which it comes by."""

    STARTING = "starting"  # no rank has a state yet
    RESTORING = "restoring"
    BETWEEN = "between"  # the newest save is committed, and no other begun
    AGREEING = "agreeing"  # ranks have stopped for a save and copy nothing yet
    COPYING = "copying"
    PUBLISHING = "publishing"  # some ranks have a snapshot of the save, others do not yet
    DIGESTING = "digesting"
    UPLOADING = "uploading"
    SHARING = "sharing"  # all objects are in the store, some rank's share is not
    COMMITTING = "committing"
    NOBODY = "nobody there"  # what was to be killed had ended by itself, or not begun


@dataclass(frozen=True, slots=True)
class SlotSeen:
    """One slot of an arena. `state`: what it held last, if it is torn."""

    state: State
    is_torn: bool = False
    is_owed: bool = False
    is_digested: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look shows: of each rank that is to be, what its page says and its arena holds."""

    attempt: int
    pages: Sequence[Phase | None]  # None: there is no page yet
    arenas: Sequence[Sequence[SlotSeen]]
    uploads: Mapping[str, bool] = field(default_factory=dict)  # of the newest owed save, by name: whether answered

    @property
    def newest_owed(self) -> State | None:
        """The newest save of this attempt that the store is still to get."""
        return max((slot.state for slots in self.arenas for slot in self.own(slots) if slot.is_owed), default=None)

    @property
    def owed(self) -> set[State]:
        """All saves that the store is still to get, those of earlier attempts too."""
        return {slot.state for slots in self.arenas for slot in slots if slot.is_owed}

    def own(self, slots: Sequence[SlotSeen]) -> list[SlotSeen]:
        """Those that hold a snapshot of this attempt."""
        return [slot for slot in slots if slot.state.attempt == self.attempt and not slot.is_torn]


def phase_of(seen: Seen) -> SavePhase:
    """Where the newest that is going on has come to, on the rank that has come least far.

    An older save may still be on its way into the store meanwhile. A slot that a killed rank has left torn looks as if
    it were written, once ranks of the next attempt stop for their first save.
    """
    if None in seen.pages or Phase.STARTING in seen.pages:
        return SavePhase.STARTING
    if Phase.LOADING in seen.pages:
        return SavePhase.RESTORING
    newest = [max((slot.state for slot in seen.own(slots)), default=None) for slots in seen.arenas]
    if len(set(newest)) > 1:
        return SavePhase.PUBLISHING
    stands = Phase.SAVING in seen.pages
    if stands and any(slot.is_torn for slots in seen.arenas for slot in slots):
        return SavePhase.COPYING
    owed = seen.newest_owed
    if owed is not None and owed == newest[0] and not _is_digested(seen, owed):
        return SavePhase.DIGESTING
    if stands:
        return SavePhase.AGREEING
    return SavePhase.BETWEEN if owed is None else _of_uploads(seen.uploads, len(seen.arenas))


def _is_digested(seen: Seen, save: State) -> bool:
    return all(slot.is_digested for slots in seen.arenas for slot in seen.own(slots) if slot.state == save)


def _of_uploads(uploads: Mapping[str, bool], ranks: int) -> SavePhase:
    if uploads.get(MANIFEST_NAME):
        return SavePhase.BETWEEN  # what is owed still is only to hear of it
    if uploads.keys() & {DCP_METADATA_NAME, MANIFEST_NAME} or all(uploads.get(share_name(n)) for n in range(ranks)):
        return SavePhase.COMMITTING
    objects = [is_answered for name, is_answered in uploads.items() if name.endswith(".distcp")]
    return SavePhase.SHARING if len(objects) == ranks and all(objects) else SavePhase.UPLOADING
