"""The shared memory of an arena as its owner sees it: where everything lies, and the words that say what is whole.

An arena is a memfd that is sparse and never changes its length, so no reader meets the end of it: a page of words, then
two slots, each with a span of addresses of its own for header, digests, outcome and data. All of these begin at a
multiple of huge pages, in which they can be mapped. What is unused costs nothing.

Words are aligned, 8 bytes, and each has one writer, as in a progress page (see `progress`). A slot's *sequence* is odd
while its rank writes and even once what it holds is whole; it grows by two with each snapshot of the arena, so that the
newest has the highest and no two share one. All other words of a slot name the sequence that they are about, or are
written before one that does: what is said of an older snapshot is never taken for the present one.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from typing import Final

from mend_trainer.flushing import Kept
from mend_trainer.progress import UnreadablePage

SLOTS: Final = 2
PAGE_BYTES: Final = 4096
HUGE_PAGE_BYTES: Final = 2 << 20
LAYOUT_VERSION: Final = 2
SLOT_SPAN: Final = 1 << 40
REGION_SPAN: Final = 1 << 30
FILE_BYTES: Final = HUGE_PAGE_BYTES + SLOTS * SLOT_SPAN
_MAGIC: Final = int.from_bytes(b"mendare\0", "little") + (LAYOUT_VERSION << 56)
_STEP_BITS: Final = 40
_FIRST_SLOT: Final = 8
_SLOT_WORDS: Final = 16


class ArenaWord(IntEnum):
    """Words of the arena as a whole."""

    MAGIC = 0
    COMMITTED = 1  # by the saver: attempt and step of the newest checkpoint that came of this arena, in one word
    NEEDED = 2  # by the rank: bytes that the snapshots of its whole worker need
    ATTEMPT = 3  # by the agent: the attempt whose ranks run here now
    TURNS = 4  # by the saver, in the first arena: grows with each turn of its loop, and each block that it digests
    MOVES = 5  # by the saver, in the first arena: grows when anything of what it saves has moved


class SlotWord(IntEnum):
    """Words of each slot, and who writes them."""

    SEQUENCE = 0  # the rank: odd while torn, even when whole, 0 before the first
    OWED = 1  # the rank: the sequence that is to be saved
    HEADER_BYTES = 2  # the rank
    HEADER_CHECK = 3  # the rank: xxh3-64 of the header, without its highest bit
    ASKED = 4  # the agent: the sequence that is to be saved although its rank did not say so
    SETTLED = 5  # the saver: the sequence that it owes no longer
    DIGESTED = 6  # the saver: the sequence whose digests are there
    DIGESTS_BYTES = 7  # the saver
    OUTCOME_BYTES = 8  # the saver: of what came of the sequence that is settled
    REACHED = 9  # the rank: attempt and step of what it holds, in one word
    COPIED = 10  # the saver: the sequence of which the buddy has a copy, or will get none
    DAMAGED = 11  # the saver: the sequence whose bytes are no longer those that it has digested


# An attribute lookup on an enum costs more than what is read by it.
_SEQUENCE: Final = int(SlotWord.SEQUENCE)
_REACHED: Final = int(SlotWord.REACHED)
_DAMAGED: Final = int(SlotWord.DAMAGED)


class Words:
    """The page of words of one arena, mapped."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, PAGE_BYTES)
        self._words = memoryview(self._memory).cast("q")
        if (found := self._words[ArenaWord.MAGIC]) != _MAGIC:
            raise UnreadablePage(f"no arena of version {LAYOUT_VERSION}: it begins with {found:#x}, not {_MAGIC:#x}")

    def get(self, slot: int, word: SlotWord) -> int:
        """One word of a slot."""
        return self._words[_FIRST_SLOT + slot * _SLOT_WORDS + word]

    def put(self, slot: int, word: SlotWord, value: int) -> None:
        """Write one word of a slot."""
        self._words[_FIRST_SLOT + slot * _SLOT_WORDS + word] = value

    def is_whole(self, slot: int) -> bool:
        """Whether the slot holds a snapshot."""
        sequence = self.get(slot, SlotWord.SEQUENCE)
        return sequence > 0 and sequence % 2 == 0

    def is_owed(self, slot: int) -> bool:
        """Whether it holds a snapshot that the store is still to get."""
        sequence = self.get(slot, SlotWord.SEQUENCE)
        owed = sequence in (self.get(slot, SlotWord.OWED), self.get(slot, SlotWord.ASKED))
        return self.is_whole(slot) and owed and self.get(slot, SlotWord.SETTLED) != sequence

    @property
    def is_in_debt(self) -> bool:
        """Whether the store is still to get anything of this arena."""
        return any(self.is_owed(slot) for slot in range(SLOTS))

    @property
    def newest(self) -> int | None:
        """The slot of the newest snapshot."""
        whole = [slot for slot in range(SLOTS) if self.is_whole(slot)]
        return max(whole, key=lambda slot: self.get(slot, SlotWord.SEQUENCE), default=None)

    @property
    def is_being_copied(self) -> bool:
        """Whether the buddy is still to get the newest snapshot."""
        slot = self.newest
        return slot is not None and self.get(slot, SlotWord.COPIED) != self.get(slot, SlotWord.SEQUENCE)

    @property
    def reached(self) -> set[int]:
        """Attempt and step of what this place has whole and sound, each in one word; every heartbeat asks for it."""
        words, found = self._words, set()
        for first in range(_FIRST_SLOT, _FIRST_SLOT + SLOTS * _SLOT_WORDS, _SLOT_WORDS):
            sequence, reached = words[first + _SEQUENCE], words[first + _REACHED]
            is_sound = sequence > 0 and not sequence % 2 and words[first + _DAMAGED] != sequence
            if is_sound and words[first + _SEQUENCE] == sequence:  # not overwritten meanwhile
                found.add(reached)
        return found

    @property
    def kept(self) -> list[Kept]:
        """What this place has whole."""
        found = []
        for slot in range(SLOTS):
            sequence = self.get(slot, SlotWord.SEQUENCE)
            kept = Kept(
                slot=slot,
                sequence=sequence,
                reached=self.get(slot, SlotWord.REACHED),
                is_owed=self.is_owed(slot),
                is_settled=self.get(slot, SlotWord.SETTLED) == sequence,
            )
            if self.is_whole(slot) and self.get(slot, SlotWord.SEQUENCE) == sequence:  # not overwritten meanwhile
                found.append(kept)
        return found

    def ask(self, kept: Kept) -> None:
        """Have this very snapshot saved; if it was overwritten since, that says nothing of the one in its slot."""
        if not kept.is_owed:
            self.put(kept.slot, SlotWord.ASKED, kept.sequence)

    @property
    def committed(self) -> tuple[int, int]:
        """Attempt and step of the newest checkpoint that came of this arena; (0, -1) before the first."""
        return unpacked(self._words[ArenaWord.COMMITTED])

    @committed.setter
    def committed(self, attempt_and_step: tuple[int, int]) -> None:
        self._words[ArenaWord.COMMITTED] = packed(*attempt_and_step)

    @property
    def attempt(self) -> int:
        """The attempt whose ranks run here now; 0 where no agent told."""
        return self._words[ArenaWord.ATTEMPT]

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._words[ArenaWord.ATTEMPT] = attempt

    def turn(self, *, moved: bool = False) -> None:
        """The saver's: it lives, and something that it saves has moved, perhaps."""
        self._words[ArenaWord.TURNS] += 1
        self._words[ArenaWord.MOVES] += moved

    @property
    def turns(self) -> int:
        """Grows as long as the saver lives and is not stuck."""
        return self._words[ArenaWord.TURNS]

    @property
    def moves(self) -> int:
        """Grows as long as anything moves of what it saves."""
        return self._words[ArenaWord.MOVES]

    @property
    def settled(self) -> int:
        """Grows with each save that was committed or given up."""
        return sum(self.get(slot, SlotWord.SETTLED) for slot in range(SLOTS))

    @property
    def needed_bytes(self) -> int:
        """What the snapshots of the worker need, as the rank has found; 0 before."""
        return self._words[ArenaWord.NEEDED]

    @needed_bytes.setter
    def needed_bytes(self, count: int) -> None:
        self._words[ArenaWord.NEEDED] = count


def packed(attempt: int, step: int) -> int:
    """Both in one word that grows with them; a step may be -1."""
    return (attempt << _STEP_BITS) + step + 1


def unpacked(reached: int) -> tuple[int, int]:
    """Attempt and step again."""
    return reached >> _STEP_BITS, reached % (1 << _STEP_BITS) - 1


def create_arena(name: str) -> int:
    """A new, empty arena that exists as long as anybody has it open; its descriptor."""
    descriptor = os.memfd_create(f"mend-{name}", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, FILE_BYTES)
    with mmap.mmap(descriptor, PAGE_BYTES) as page, memoryview(page).cast("q") as words:
        words[ArenaWord.MAGIC] = _MAGIC
    return descriptor


def arena_path(descriptor: int) -> str:
    """Where other processes of this user open the arena of this process, as long as it lives."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def region_start(slot: int, region: int) -> int:
    """Where in the file a slot's header (0), digests (1), outcome (2) or data (4) begin."""
    return HUGE_PAGE_BYTES + slot * SLOT_SPAN + region * REGION_SPAN
