"""The arenas of a worker, as its agent has them: one for each place, and as many for copies from another worker."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mend.environment import ENV_ARENA, ENV_ARENAS
from mend_trainer.flushing import to_flush
from mend_trainer.slots import Words, arena_path, create_arena, packed, unpacked
from mend_trainer.stillness import Signs


class Arenas:
    """Made empty with the agent, and gone with it. They outlive every rank and every saver."""

    def __init__(self, places: int) -> None:
        self._own = [create_arena(f"place-{number}") for number in range(places)]
        self._copies = [create_arena(f"copy-{number}") for number in range(places)]
        self.words = [Words(descriptor) for descriptor in self._own]

    @property
    def own(self) -> tuple[str, ...]:
        """Where the saver finds the snapshots of this worker's ranks, by place."""
        return tuple(map(arena_path, self._own))

    @property
    def copies(self) -> tuple[str, ...]:
        """Where it keeps those of the worker whose buddy this one is."""
        return tuple(map(arena_path, self._copies))

    def environment(self, place: int) -> dict[str, str]:
        """What the rank at that place is told; nothing at a place that is not foreseen."""
        if place >= len(self._own):
            return {}
        return {ENV_ARENA: self.own[place], ENV_ARENAS: ",".join((*self.own, *self.copies))}

    def committed_step(self, place: int, attempt: int) -> int:
        """Step of the newest checkpoint of that attempt to which this place has contributed; -1: none."""
        found, step = self.words[place].committed if place < len(self.words) else (0, -1)
        return step if found == attempt else -1

    def reached(self, places: int) -> tuple[int, int]:
        """Attempt and step of the newest snapshots that so many ranks of this worker have whole; (0, -1): none."""
        common = set.intersection(*(words.reached for words in self.words[:places])) if self.words else set()
        return unpacked(max(common)) if common else (0, -1)

    def begin(self, attempt: int) -> None:
        """Ranks of this attempt are started: what those before owe is not waited for as long."""
        for words in self.words:
            words.attempt = attempt

    @property
    def needed_bytes(self) -> int:
        """What this worker's snapshots need in all; 0 before its ranks know."""
        return max((words.needed_bytes for words in self.words), default=0)

    @property
    def are_in_debt(self) -> bool:
        """Whether the store is still to get anything."""
        return any(words.is_in_debt for words in self.words)

    @property
    def signs(self) -> Signs:
        """What can be seen here of the saver."""
        first = self.words[:1]
        return Signs(
            turns=sum(words.turns for words in first),
            moves=sum(words.moves for words in first),
            settled=sum(words.settled for words in self.words),
            is_in_debt=self.are_in_debt,
        )

    def flush(self, places: int) -> bool:
        """Have the newest step saved that so many ranks of this worker have whole, if nothing newer is committed.

        Whether there is something new to do for the saver.
        """
        asked = self.words[:places]
        committed = max((packed(*words.committed) for words in asked), default=0)
        snapshots = to_flush([words.kept for words in asked], committed)
        for words, kept in zip(asked, snapshots, strict=False):  # or there are none
            words.ask(kept)
        return any(not kept.is_owed for kept in snapshots)

    def close(self) -> None:
        """Let them go."""
        descriptors: Sequence[int] = (*self._own, *self._copies)
        for descriptor in descriptors:
            os.close(descriptor)
