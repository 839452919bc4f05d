"""The footing of a rank: what it needs, beside the weights, to go on from a step that it has completed.

It is kept in memory that the agent owns, after every step, so that a process that takes the rank's place continues its
random numbers where they were. Two slots are written in turn, each with its digest last: a rank that is killed in the
middle of writing leaves the other one whole.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from mend.protocol import Message

_SLOT_BYTES: Final = 1 << 18  # untouched pages of it cost no memory
_HEAD: Final = struct.Struct("<QQ")  # length of what follows, its digest
_SUFFIX_BEFORE: Final = ".before"


class Footing(Message, frozen=True, kw_only=True):
    """One completed step of one rank."""

    step: int
    tokens: int
    values: dict[str, Any]  # states of scheduler, loader and the like, as JSON
    generators: dict[str, bytes]  # see `rng.rng_bytes`

    @property
    def drawn(self) -> int:
        """Equal as long as no random number is drawn."""
        return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(self.generators))


_decode: Final = msgspec.msgpack.Decoder(Footing).decode


class FootingPage:
    """The two slots of one rank, in a file that its agent made."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = mmap.mmap(descriptor, 2 * _SLOT_BYTES)
        finally:
            os.close(descriptor)
        self._next = 0

    def keep(self, footing: Footing) -> bool:
        """Write one more step over the older of the two; False if it is too large to be kept."""
        raw = msgspec.msgpack.encode(footing)
        if len(raw) > _SLOT_BYTES - _HEAD.size:
            return False
        start, self._next = self._next * _SLOT_BYTES, 1 - self._next
        self._memory[start : start + _HEAD.size] = bytes(_HEAD.size)
        self._memory[start + _HEAD.size : start + _HEAD.size + len(raw)] = raw
        self._memory[start : start + _HEAD.size] = _HEAD.pack(len(raw), xxhash.xxh3_64_intdigest(raw))
        return True

    def read(self) -> tuple[Footing, ...]:
        """What is whole, newest last."""
        found = [each for each in map(self._slot, range(2)) if each is not None]
        return tuple(sorted(found, key=lambda each: each.step))

    def _slot(self, number: int) -> Footing | None:
        start = number * _SLOT_BYTES
        length, digest = _HEAD.unpack(self._memory[start : start + _HEAD.size])
        raw = self._memory[start + _HEAD.size : start + _HEAD.size + length]
        if not 0 < length <= _SLOT_BYTES - _HEAD.size or xxhash.xxh3_64_intdigest(raw) != digest:
            return None
        try:
            return _decode(raw)
        except msgspec.MsgspecError:
            return None


def create_footing(path: Path) -> None:
    """Make an empty one; that of a rank that had this place before is kept beside it."""
    if path.exists():
        path.rename(path.with_name(path.name + _SUFFIX_BEFORE))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(descriptor, 2 * _SLOT_BYTES)
    os.close(descriptor)


def read_inherited(path: Path) -> tuple[Footing, ...]:
    """What the rank that had this place before has kept, newest last; empty if there was none."""
    before = path.with_name(path.name + _SUFFIX_BEFORE)
    return FootingPage(before).read() if before.exists() else ()
