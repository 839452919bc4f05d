"""The arena of one place: the last two snapshots of a rank in shared memory, published whole or not at all.

A snapshot is used by whoever maps the arena: the saver that uploads it, a rank that restores, the saver that serves it
to a peer. It may be replaced meanwhile, unless it is owed: who has read it asks `is_whole` afterwards.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import xxhash

from mend.protocol import Message
from mend.states import Ancestor
from mend_trainer.checkpoint.copying import Room, copy_in, pin, unpin
from mend_trainer.checkpoint.layout import Block, starts, torch_dtype
from mend_trainer.checkpoint.mapping import mapped
from mend_trainer.slots import REGION_SPAN, SLOTS, SlotWord, Words, create_arena, packed, region_start

_HEADER, _DIGESTS, _OUTCOME, _DATA = 0, 1, 2, 4
_POSITIVE: Final = (1 << 63) - 1
_NOTHING: Final = torch.empty(0, dtype=torch.uint8)


class Origin(Message, frozen=True, kw_only=True):
    """Whose state it is, and of when: the same on all ranks of the save, but for `values`, where rank 0's count."""

    run: str
    run_uid: str
    attempt: int
    lineage: tuple[Ancestor, ...]
    config_digest: str
    step: int
    tokens: int
    values: dict[str, Any]
    created_unix_seconds: float = 0.0  # becomes the manifest's, so that two who commit write the same bytes


class Header(Message, frozen=True, kw_only=True):
    """What a snapshot is: enough for a saver that knows nothing else to make its part of a checkpoint."""

    save_id: str
    origin: Origin
    rank: int
    world_size: int
    blocks: tuple[Block, ...]
    uri: str  # the store that it is for; "": it stays in memory
    endpoint: str | None = None
    verify: bool = False
    may_repeat: bool = False  # the weights may be as in the save before
    save_seconds: float = 900.0  # how long its save may take
    stall_seconds: float = 0.0  # of the copy

    @property
    def starts(self) -> Sequence[int]:
        """Where in the snapshot's data each block begins."""
        return starts(self.blocks)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One whole snapshot as it was found; check `is_whole` after having read its bytes."""

    arena: Arena
    slot: int
    sequence: int
    header: Header

    @property
    def is_whole(self) -> bool:
        """Whether the slot still holds this snapshot."""
        return self.arena.words.get(self.slot, SlotWord.SEQUENCE) == self.sequence

    @property
    def is_owed(self) -> bool:
        """Whether it is to become part of a checkpoint."""
        return self.is_whole and self.arena.words.is_owed(self.slot)

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.header.blocks)

    @property
    def starts(self) -> Sequence[int]:
        """Where in `data` each block begins."""
        return self._layout.starts

    @cached_property
    def data(self) -> memoryview:
        """All its blocks, each at its start."""
        return self.arena.view(self.slot, _DATA, self._layout.bytes, touch=False)

    def read_into(self, into: memoryview, start: int) -> None:
        """Fill `into` (writable bytes) with its data from `start` on, without mapping it.

        Raises EOFError where the arena ends before, OSError for memory that the kernel cannot read: mapped, either
        would be a signal that ends the process.
        """
        place, done = region_start(self.slot, _DATA) + start, 0
        while done < len(into):
            count = os.preadv(self.arena.descriptor, [into[done:]], place + done)
            if not count:
                raise EOFError(f"the arena ends {len(into) - done} bytes before the end of what is to be read")
            done += count

    def raw(self, index: int) -> memoryview:
        """The bytes of the block at `index`."""
        return self.data[self.starts[index] : self.starts[index] + self.header.blocks[index].bytes]

    @property
    def digests(self) -> tuple[str, ...] | None:
        """Those of all blocks, in their order, once the saver has taken them."""
        words = self.arena.words
        if words.get(self.slot, SlotWord.DIGESTED) != self.sequence:
            return None
        length = words.get(self.slot, SlotWord.DIGESTS_BYTES)
        said = bytes(self.arena.view(self.slot, _DIGESTS, length))
        return msgspec.json.decode(said, type=tuple[str, ...]) if self.is_whole else None

    def add_digests(self, digests: Sequence[str]) -> None:
        """The saver's: what the bytes are to be held against from now on."""
        said = msgspec.json.encode(digests)
        self.arena.view(self.slot, _DIGESTS, len(said))[:] = said
        self.arena.words.put(self.slot, SlotWord.DIGESTS_BYTES, len(said))
        self.arena.words.put(self.slot, SlotWord.DIGESTED, self.sequence)

    @property
    def is_damaged(self) -> bool:
        """Whether its bytes were found to be others than those that were digested."""
        return self.arena.words.get(self.slot, SlotWord.DAMAGED) == self.sequence

    @property
    def is_held(self) -> bool:
        """Whether it may be offered to be restored from: it has digests, and was not found damaged since."""
        return self.digests is not None and not self.is_damaged

    def condemn(self) -> None:
        """The saver's: nobody is to use it any more, nor to wait for its copy."""
        self.arena.words.put(self.slot, SlotWord.DAMAGED, self.sequence)
        self.mark_copied()

    def settle(self, outcome: bytes) -> None:
        """The saver's: nothing is owed of this snapshot any more, and this is what came of it."""
        outcome = outcome[:REGION_SPAN]
        self.arena.view(self.slot, _OUTCOME, len(outcome))[:] = outcome
        self.arena.words.put(self.slot, SlotWord.OUTCOME_BYTES, len(outcome))
        self.arena.words.put(self.slot, SlotWord.SETTLED, self.sequence)

    def mark_copied(self) -> None:
        """The saver's: whoever waits for its copy at the buddy need not do so any longer."""
        self.arena.words.put(self.slot, SlotWord.COPIED, self.sequence)

    @property
    def outcome(self) -> bytes | None:
        """What came of it; None while it is owed, or if it never was."""
        words = self.arena.words
        if words.get(self.slot, SlotWord.SETTLED) != self.sequence:
            return None
        return bytes(self.arena.view(self.slot, _OUTCOME, words.get(self.slot, SlotWord.OUTCOME_BYTES)))


class Layout:
    """Where in a slot each block goes: reckoned once for all snapshots of the same blocks."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.starts = starts(self.blocks)
        self.bytes = self.starts[-1] + self.blocks[-1].bytes if blocks else 0


class Draft:
    """A snapshot in the making; its slot is torn until it is published."""

    def __init__(self, arena: Arena, slot: int, sequence: int, layout: Layout) -> None:
        self.slot, self.sequence, self.blocks = slot, sequence, layout.blocks
        self._arena, self._starts = arena, layout.starts
        self._data = arena.view(slot, _DATA, layout.bytes)

    def raw(self, index: int) -> memoryview:
        """Room for the bytes of the block at `index`."""
        return self._data[self._starts[index] : self._starts[index] + self.blocks[index].bytes]

    @property
    def data(self) -> memoryview:
        """Room for all its blocks, each at its start."""
        return self._data

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy these tensors in, those of the blocks' names; back when every byte is there."""
        copy_in(self._arena.rooms(self), tensors)

    def publish(self, header: Header, *, owed: bool) -> Snapshot:
        """From now on it is a snapshot."""
        assert header.blocks == self.blocks
        words, said = self._arena.words, msgspec.json.encode(header)
        if len(said) > REGION_SPAN:
            raise ValueError(f"`values` and names of tensors take {len(said)} bytes; at most {REGION_SPAN} are kept")
        self._arena.view(self.slot, _HEADER, len(said))[:] = said
        words.put(self.slot, SlotWord.HEADER_BYTES, len(said))
        words.put(self.slot, SlotWord.HEADER_CHECK, _check(said))
        words.put(self.slot, SlotWord.REACHED, packed(header.origin.attempt, header.origin.step))
        if owed:
            words.put(self.slot, SlotWord.OWED, self.sequence)
        words.put(self.slot, SlotWord.SEQUENCE, self.sequence)
        return Snapshot(self._arena, self.slot, self.sequence, header)

    def rooms(self) -> list[Room]:
        """The places of all blocks, as tensors."""
        return [self._room(index) for index in range(len(self.blocks))]

    def _room(self, index: int) -> Room:
        block = self.blocks[index]
        flat = torch.frombuffer(self.raw(index), dtype=torch.uint8) if block.bytes else _NOTHING
        return Room(block.name, flat.view(torch_dtype(block.dtype)).view(block.sizes), flat.data_ptr(), block.bytes)


class Arena:
    """One arena, mapped as far as it is used."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor).atexit = False
        self.words = Words(descriptor)
        self._regions: dict[tuple[int, int], memoryview] = {}
        self._read: dict[int, tuple[int, Header]] = {}  # by slot: headers are long, and asked for again and again
        self._layout = Layout(())  # the last one
        self._rooms: dict[int, tuple[tuple[Block, ...], list[Room]]] = {}
        self._pins = False
        self._pinned_slots: set[int] = set()  # whose data is pinned as it is mapped

    @classmethod
    def create(cls, name: str) -> Arena:
        """A new one, of this process."""
        return cls(create_arena(name))

    @classmethod
    def attach(cls, path: str | Path) -> Arena:
        """One that another process has made; raises OSError if that process is gone."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    @property
    def descriptor(self) -> int:
        """The file, open as long as this object is in use."""
        return self._descriptor

    def snapshots(self) -> list[Snapshot]:
        """Those that are whole, the newest last."""
        found = [snapshot for slot in range(SLOTS) if (snapshot := self._snapshot(slot))]
        return sorted(found, key=lambda snapshot: snapshot.sequence)

    @property
    def has_room(self) -> bool:
        """Whether a snapshot could be taken now."""
        return self._oldest_free() is not None

    def prepare(self, blocks: Sequence[Block], *, pinned: bool = False) -> None:
        """Allocate and touch what two snapshots need: the page faults of first touch cost ten times a copy."""
        self._pins = pinned
        for slot in range(SLOTS):
            self.view(slot, _DATA, self._layout_of(blocks).bytes)

    def begin(self, blocks: Sequence[Block], keep: int | None = None) -> Draft | None:
        """Make room in the place of the oldest snapshot that is not owed; None if both are. `keep`: not that slot."""
        if (slot := self._oldest_free(keep)) is None:
            return None
        sequence = max(self.words.get(each, SlotWord.SEQUENCE) for each in range(SLOTS))
        sequence += 2 - sequence % 2
        self.words.put(slot, SlotWord.SEQUENCE, sequence - 1)
        return Draft(self, slot, sequence, self._layout_of(blocks))

    def rooms(self, draft: Draft) -> list[Room]:
        """As the draft's; made once for all drafts of the same blocks, since states have thousands of tensors."""
        known = self._rooms.get(draft.slot)
        if known is None or known[0] != draft.blocks:
            known = self._rooms[draft.slot] = draft.blocks, draft.rooms()
        return known[1]

    def view(self, slot: int, region: int, length: int, *, touch: bool = True) -> memoryview:
        """The first bytes of one part of a slot, made present at once; without `touch`, by the threads that read."""
        there = self._regions.get((slot, region))
        if there is None or len(there) < length:
            before, there = there, mapped(self._descriptor, region_start(slot, region), length, touch=touch)
            self._regions[slot, region] = there
            self._rooms.pop(slot, None)
            if region == _DATA and slot in self._pinned_slots and before is not None:
                self._pinned_slots.remove(slot)
                unpin(before)
            if region == _DATA and self._pins and pin(there):
                self._pinned_slots.add(slot)
        return there[:length]

    def _layout_of(self, blocks: Sequence[Block]) -> Layout:
        if self._layout.blocks != blocks:
            self._layout = Layout(blocks)
        return self._layout

    def _oldest_free(self, keep: int | None = None) -> int | None:
        free = [slot for slot in range(SLOTS) if slot != keep and not self.words.is_owed(slot)]
        # One that is torn holds nothing that anybody could want.
        return min(free, key=lambda slot: (self.words.is_whole(slot), self._sequence(slot)), default=None)

    def _sequence(self, slot: int) -> int:
        return self.words.get(slot, SlotWord.SEQUENCE)

    def _snapshot(self, slot: int) -> Snapshot | None:
        sequence = self._sequence(slot)
        if not self.words.is_whole(slot):
            return None
        known = self._read.get(slot)
        if known is not None and known[0] == sequence:
            return Snapshot(self, slot, sequence, known[1])
        length, check = (self.words.get(slot, word) for word in (SlotWord.HEADER_BYTES, SlotWord.HEADER_CHECK))
        if not 0 < length <= REGION_SPAN:
            return None
        said = bytes(self.view(slot, _HEADER, length))
        if _check(said) != check or self._sequence(slot) != sequence:
            return None
        header = msgspec.json.decode(said, type=Header)
        self._read[slot] = sequence, header
        return Snapshot(self, slot, sequence, header)


def _check(said: bytes) -> int:
    return xxhash.xxh3_64_intdigest(said) & _POSITIVE
