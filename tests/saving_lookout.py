"""Looks at the pages, arenas and uploads of a gang's ranks, from outside and fast enough to catch a copy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from mend.heartbeats import Phase
from mend_trainer.progress import PageReader
from mend_trainer.slots import SLOTS, SlotWord, Words, unpacked
from reached import State
from saving_phases import Seen, SlotSeen

_BETWEEN_LOOKS_SECONDS: Final = 0.0001  # a copy of this size takes 0.4 ms


class Lookout:
    """Of one attempt, whose launch has been ordered. `agents` has the agent's process of each rank, in their order."""

    def __init__(
        self, attempt: int, agents: Sequence[int], places: Sequence[int], uploads: Callable[[State], Mapping[str, bool]]
    ) -> None:
        """`places`: of each rank, which of its agent's."""
        self._attempt, self._uploads = attempt, uploads
        self._pages = [_page(agent, attempt, rank) for rank, agent in enumerate(agents)]
        self._arenas = [_arena(agent, place) for agent, place in zip(agents, places, strict=True)]

    def seen(self) -> Seen:
        """Everything as it is now."""
        pages = [page.read().phase if page else None for page in self._pages]
        arenas = [[_slot(words, slot) for slot in range(SLOTS)] if words else [] for words in self._arenas]
        newest = Seen(self._attempt, pages, arenas).newest_owed
        return Seen(self._attempt, pages, arenas, self._uploads(newest) if newest else {})

    def wait(self, holds: Callable[[], bool], seconds: float) -> None:
        """Until this holds, or so long. Blocks."""
        deadline = time.monotonic() + seconds
        while not holds() and time.monotonic() < deadline:
            time.sleep(_BETWEEN_LOOKS_SECONDS)

    def stops(self, rank: int) -> bool:
        """Whether it stands for a save that there is room for."""
        words = self._arenas[rank]
        return self.is_in(rank, Phase.SAVING) and not (words and all(words.is_owed(slot) for slot in range(SLOTS)))

    def copies(self, rank: int) -> bool:
        """Whether it writes a snapshot."""
        words = self._arenas[rank]
        is_torn = words is not None and any(words.get(slot, SlotWord.SEQUENCE) % 2 for slot in range(SLOTS))
        return is_torn and self.is_in(rank, Phase.SAVING)

    def is_in(self, rank: int, phase: Phase) -> bool:
        """Whether its page says so."""
        page = self._pages[rank]
        return page is not None and page.read().phase is phase

    def close(self) -> None:
        """Let go of the pages."""
        for page in filter(None, self._pages):
            page.close()


def arena_path(agent: int, place: int) -> Path:
    """The shared memory of this place; raises OSError if the agent is gone."""
    for file in Path(f"/proc/{agent}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if f"memfd:mend-place-{place} " in f"{file.readlink()} ":
                return file
    raise FileNotFoundError(f"the agent {agent} has no arena for place {place}")


def _arena(agent: int, place: int) -> Words | None:
    try:
        descriptor = os.open(arena_path(agent, place), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return Words(descriptor)
    finally:
        os.close(descriptor)


def _page(agent: int, attempt: int, rank: int) -> PageReader | None:
    """As the agent itself has it mapped."""
    try:
        mapped = Path(f"/proc/{agent}/maps").read_text().splitlines()
        found = [line.split(maxsplit=5)[5] for line in mapped if line.endswith(f"/{attempt}/rank-{rank}.page")]
        return PageReader(Path(found[0])) if found else None
    except OSError:
        return None


def _slot(words: Words, slot: int) -> SlotSeen:
    attempt, step = unpacked(words.get(slot, SlotWord.REACHED))
    sequence = words.get(slot, SlotWord.SEQUENCE)
    return SlotSeen(
        State(step, attempt),
        is_torn=sequence % 2 == 1,
        is_owed=words.is_owed(slot),
        is_digested=words.get(slot, SlotWord.DIGESTED) == sequence,
    )
