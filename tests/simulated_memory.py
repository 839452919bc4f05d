"""Simulated snapshots: what lies in the shared memory of a pod for as long as its agent lives, ranks or no ranks."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from mend.listing import StoredCheckpoint
from mend.states import MEMORY_SCHEME, Ancestor, CheckpointRef, Held, Pending

SLOTS = 2
COPY_SECONDS = 0.2  # until the buddy has it


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of the state at one step."""

    save_id: str
    rank: int
    state: StoredCheckpoint  # what it is a part of
    at: float


def a_state(
    save_id: str, uid: str, attempt: int, step: int, size: int, lineage: tuple[Ancestor, ...]
) -> StoredCheckpoint:
    """What all snapshots of a save make up."""
    ref = CheckpointRef(uri=f"{MEMORY_SCHEME}{save_id}", step=step, attempt=attempt)
    return StoredCheckpoint(ref=ref, run_uid=uid, lineage=lineage, world_size=size, tokens=100 * (step + 1))


def _slots() -> defaultdict[int, deque[Snapshot]]:
    return defaultdict(lambda: deque(maxlen=SLOTS))


@dataclass
class Arena:
    """The last two snapshots of each place of a worker, and of each place of the worker whose buddy it is."""

    digest_seconds: float = 0.0  # until the saver has taken the digests of a snapshot
    places: defaultdict[int, deque[Snapshot]] = field(default_factory=_slots)
    copies: defaultdict[int, deque[Snapshot]] = field(default_factory=_slots)

    def snapshots(self) -> Iterator[Snapshot]:
        """All that lie here."""
        for slots in (*self.places.values(), *self.copies.values()):
            yield from slots

    def find(self, save_id: str, rank: int) -> Snapshot | None:
        """This rank's part of a save, if it is still here."""
        return next((each for each in self.snapshots() if (each.save_id, each.rank) == (save_id, rank)), None)

    def copy_to(self, buddy: Arena, now: float) -> None:
        """The newest snapshots that had the time to get there."""
        for place, slots in self.places.items():
            due = [each for each in slots if each.at + self.digest_seconds + COPY_SECONDS <= now]
            if due and due[-1] not in buddy.copies[place]:
                buddy.copies[place].append(due[-1])

    def pending(self, ranks: tuple[int, ...], step_seconds: float, now: float) -> Pending | None:
        """As a heartbeat tells it: the newest of these ranks, while digests are taken of them."""
        newest = [slots[-1] for slots in self.places.values() if slots and slots[-1].rank in ranks]
        waiting = [each for each in newest if each.at + self.digest_seconds > now]
        if not waiting or len(newest) < len(ranks) or len({each.save_id for each in newest}) > 1:
            return None
        ref, size = waiting[0].state.ref, waiting[0].state.world_size
        return Pending(attempt=ref.attempt, step=ref.step, world_size=size, ranks=ranks, step_seconds=step_seconds)

    def held(self, now: float) -> tuple[Held, ...]:
        """As a heartbeat tells it."""
        found: dict[StoredCheckpoint, set[int]] = {}
        for slots in self.places.values():
            for each in slots:
                if each.at + self.digest_seconds <= now:
                    found.setdefault(each.state, set()).add(each.rank)
        for slots in self.copies.values():
            for each in slots:
                found.setdefault(each.state, set()).add(each.rank)
        return tuple(
            Held(
                save_id=state.ref.save_in_memory,
                run_uid=state.run_uid,
                attempt=state.ref.attempt,
                step=state.ref.step,
                tokens=state.tokens,
                world_size=state.world_size,
                ranks=tuple(sorted(ranks)),
                lineage=state.lineage,
            )
            for state, ranks in found.items()
        )
