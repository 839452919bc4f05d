"""What a look at pages, arenas and uploads says of how far a save or a restore has come."""

from __future__ import annotations

import pytest

from mend.heartbeats import Phase
from reached import State
from saving_phases import SavePhase, Seen, SlotSeen, phase_of

NOW, BEFORE = State(step=8, attempt=3), State(step=5, attempt=3)
OLD = SlotSeen(BEFORE, is_digested=True)
TORN = SlotSeen(BEFORE, is_torn=True)
NEW = SlotSeen(NOW, is_owed=True)
READY = SlotSeen(NOW, is_owed=True, is_digested=True)
DONE = SlotSeen(NOW, is_digested=True)
OBJECTS = {"__0_0.distcp": True, "__1_0.distcp": True}
SHARES = {"share-000000.json": True, "share-000001.json": True}
STEP, SAVING = Phase.STEP, Phase.SAVING

CASES = {
    "a rank has no page yet": ((None, STEP), ([], []), {}, SavePhase.STARTING),
    "a rank is not in the session yet": ((Phase.STARTING, Phase.LOADING), ([], []), {}, SavePhase.STARTING),
    "a rank restores": ((Phase.LOADING, STEP), ([OLD], [OLD]), {}, SavePhase.RESTORING),
    "both train": ((STEP, STEP), ([OLD, DONE], [OLD, DONE]), {}, SavePhase.BETWEEN),
    "one has stopped": ((SAVING, STEP), ([OLD, DONE], [OLD, DONE]), {}, SavePhase.AGREEING),
    "one writes": ((SAVING, SAVING), ([OLD, TORN], [OLD, DONE][:1]), {}, SavePhase.COPYING),
    "one has published": ((STEP, SAVING), ([OLD, NEW], [OLD, TORN]), {}, SavePhase.PUBLISHING),
    "one has no digests yet": ((STEP, SAVING), ([OLD, NEW], [OLD, READY]), {}, SavePhase.DIGESTING),
    "nothing is asked of the store": ((STEP, STEP), ([OLD, READY], [OLD, READY]), {}, SavePhase.UPLOADING),
    "one object lacks its answer": (
        (STEP, STEP),
        ([OLD, READY], [OLD, READY]),
        {"__0_0.distcp": True, "__1_0.distcp": False, "share-000000.json": True},
        SavePhase.UPLOADING,
    ),
    "objects are there": ((STEP, STEP), ([OLD, READY], [OLD, READY]), OBJECTS, SavePhase.SHARING),
    "shares are there": ((STEP, STEP), ([OLD, READY], [OLD, READY]), OBJECTS | SHARES, SavePhase.COMMITTING),
    "the manifest is on its way": (
        (STEP, STEP),
        ([OLD, READY], [OLD, READY]),
        OBJECTS | {"manifest.json": False},
        SavePhase.COMMITTING,
    ),
    "the manifest is there, and not every saver has heard of it": (
        (STEP, STEP),
        ([OLD, DONE], [OLD, READY]),
        OBJECTS | {"manifest.json": True},
        SavePhase.BETWEEN,
    ),
    "what is owed is of an attempt before": (
        (STEP, STEP),
        ([SlotSeen(State(9, 2), is_owed=True)], [OLD]),
        {},
        SavePhase.PUBLISHING,
    ),
    "only an attempt before owes": (
        (STEP, STEP),
        ([SlotSeen(State(9, 2), is_owed=True), OLD], [OLD]),
        {},
        SavePhase.BETWEEN,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_look_is_told_in_a_word(name: str) -> None:
    """The newest save counts, and of it the rank that has come least far."""
    pages, arenas, uploads, phase = CASES[name]
    assert phase_of(Seen(3, pages, arenas, uploads)) is phase


def test_every_phase_can_be_told() -> None:
    """But for a kill that meets nobody, of which the kill itself tells."""
    assert {phase for *_, phase in CASES.values()} == set(SavePhase) - {SavePhase.NOBODY}
