"""What lies in a worker's memory: its own ranks' snapshots, and the copies of its buddy's that it takes in."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus

import xxhash

from mend.states import Held
from mend_trainer.checkpoint.arena import Arena, Draft, Header, Snapshot
from mend_trainer.checkpoint.layout import starts
from mend_trainer.checkpoint.sources import Sheet, sheet_of
from mend_trainer.copies.sheets import decode_sheet, encode_sheet, size_of
from mend_trainer.copies.wire import Refused

log = logging.getLogger(__name__)


class ArenaShelf:
    """The arenas of one worker: `own` are written by its ranks, `copies` by this shelf alone.

    Of each rank that the buddy has, one arena of `copies` keeps the last two. `room_for` is asked before so many bytes
    more are taken, and says why not.
    """

    def __init__(
        self,
        own: Sequence[Arena],
        copies: Sequence[Arena],
        *,
        run_uid: str = "",
        room_for: Callable[[int], str] = lambda size: "",
        on_copy: Callable[[], object] = lambda: None,
    ) -> None:
        self.own, self._copies = tuple(own), tuple(copies)
        self.run_uid = run_uid
        self._room_for, self.on_copy = room_for, on_copy
        self._lock = threading.Lock()
        self._coming: dict[Arena, ComingCopy] = {}

    # ------------------------------------------------------------ what is here
    def held(self) -> tuple[Held, ...]:
        """All that lies whole here, the newest save first."""
        return held([snapshot for snapshot, _ in self._found()])

    def find(self, save_id: str, rank: int) -> KeptSnapshot | None:
        """The snapshot of that rank of that save, its own rank's or a copy."""
        for snapshot, sheet in self._found():
            if (snapshot.header.save_id, snapshot.header.rank) == (save_id, rank):
                return KeptSnapshot(snapshot, sheet)
        return None

    def _found(self) -> Iterator[tuple[Snapshot, Sheet]]:
        for arena in (*self.own, *self._copies):
            for snapshot in arena.snapshots():
                if sheet := sheet_of(snapshot):
                    yield snapshot, sheet

    # ------------------------------------------------------------ what is coming
    def take(self, sealed: bytes, beside: str = "") -> ComingCopy:
        """Room for the copy that this header offers; raises `Refused` where a newer one is kept, or none fits."""
        sheet = decode_sheet(sealed)
        with self._lock:
            self._check_run(sheet)
            arena = self._arena_for(sheet)
            self._check_age(sheet, arena)
            self._check_room(sheet, arena)
            keep = [each.slot for each in arena.snapshots() if each.header.save_id == beside]
            draft = arena.begin(sheet.header.blocks, keep[0] if keep else None)
            assert draft is not None, "copies are owed to nobody"
            coming = self._coming[arena] = ComingCopy(self, arena, draft, sheet)
        return coming

    def let_go(self, coming: ComingCopy) -> None:
        """The transfer is over, one way or the other."""
        with self._lock:
            if self._coming.get(coming.arena) is coming:
                del self._coming[coming.arena]

    def _check_run(self, sheet: Sheet) -> None:
        if self.run_uid and sheet.header.origin.run_uid != self.run_uid:
            raise Refused(f"a snapshot of run {sheet.header.origin.run_uid!r}; this is a worker of {self.run_uid!r}")

    def _arena_for(self, sheet: Sheet) -> Arena:
        """That of the rank; else an empty one, else that of a rank which the newer attempt does not have here."""
        ranks = {arena: self._rank_in(arena) for arena in self._copies}
        mine = [arena for arena in self._copies if ranks[arena] == sheet.header.rank]
        empty = [arena for arena in self._copies if ranks[arena] is None]
        old = [arena for arena in self._copies if self._newest(arena) < (sheet.header.origin.attempt, -1)]
        for arena in (*mine, *empty, *sorted(old, key=self._newest)):
            return arena
        raise Refused(
            f"room for copies of {len(self._copies)} ranks, and all is taken", HTTPStatus.INSUFFICIENT_STORAGE
        )

    def _check_age(self, sheet: Sheet, arena: Arena) -> None:
        age = _age(sheet)
        if any(snapshot.header.save_id == sheet.header.save_id for snapshot in arena.snapshots()):
            raise Refused("it is kept already", HTTPStatus.ALREADY_REPORTED)
        if (newest := self._newest(arena)) >= age:
            raise Refused(f"attempt {age[0]} step {age[1]}: attempt {newest[0]} step {newest[1]} is kept already")
        coming = self._coming.get(arena)
        if coming is not None:
            if _age(coming.sheet) < age:
                coming.cancel()
            raise Refused("another transfer of this rank is under way; ask again", HTTPStatus.SERVICE_UNAVAILABLE)

    def _check_room(self, sheet: Sheet, arena: Arena) -> None:
        more = 2 * size_of(sheet) - os.fstat(arena.descriptor).st_blocks * 512
        if more > 0 and (problem := self._room_for(more)):
            log.warning("a copy of rank %d is refused: %s", sheet.header.rank, problem)
            raise Refused(problem, HTTPStatus.INSUFFICIENT_STORAGE)

    def _rank_in(self, arena: Arena) -> int | None:
        if arena in self._coming:
            return self._coming[arena].sheet.header.rank
        snapshots = arena.snapshots()
        return snapshots[-1].header.rank if snapshots else None

    def _newest(self, arena: Arena) -> tuple[int, int]:
        """Attempt and step of the newest copy in it."""
        origins = [snapshot.header.origin for snapshot in arena.snapshots()]
        return max(((origin.attempt, origin.step) for origin in origins), default=(-1, -1))


class KeptSnapshot:
    """A snapshot as the server sends it."""

    def __init__(self, snapshot: Snapshot, sheet: Sheet) -> None:
        self._snapshot, self._sheet = snapshot, sheet
        self.data = snapshot.data

    @property
    def sheet(self) -> bytes:
        """As it goes over the wire."""
        return encode_sheet(self._sheet)

    def is_whole(self) -> bool:
        """Whether nobody has begun to overwrite it."""
        return self._snapshot.is_whole


class ComingCopy:
    """A copy on its way into its slot, which is torn until all is there and proven."""

    def __init__(self, shelf: ArenaShelf, arena: Arena, draft: Draft, sheet: Sheet) -> None:
        self.arena, self.sheet = arena, sheet
        self.bytes = size_of(sheet)
        self.room = draft.data
        self._shelf, self._draft = shelf, draft
        self._starts = starts(sheet.header.blocks)
        self._came = 0
        self._proven = 0  # blocks
        self._digest = xxhash.xxh3_128()  # of what has come of the next
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody wants it any more; said by another thread."""
        self._cancelled = True

    def came(self, length: int) -> None:
        """So many bytes more: they are digested while the cache has them, and each block is proven once it is there."""
        if self._cancelled:
            raise Refused("a newer snapshot is offered")
        before, self._came = self._came, self._came + length
        while self._proven < len(self._starts):
            begin, end = self._starts[self._proven], self._end(self._proven)
            self._digest.update(self.room[max(begin, before) : max(begin, min(end, self._came))])
            if end > self._came:
                return
            if self._digest.hexdigest() != self.sheet.digests[self._proven]:
                name = self.sheet.header.blocks[self._proven].name[:80]
                raise Refused(f"{name}: the bytes do not have their digest", HTTPStatus.UNPROCESSABLE_ENTITY)
            self._proven += 1
            self._digest = xxhash.xxh3_128()

    def publish(self) -> None:
        """From now on it is held."""
        self.came(0)
        assert self._proven == len(self.sheet.header.blocks)
        self._draft.publish(self.sheet.header, owed=False).add_digests(self.sheet.digests)
        self._shelf.let_go(self)
        self._shelf.on_copy()

    def drop(self) -> None:
        """It broke off: the slot stays torn, and the next copy goes there."""
        self._shelf.let_go(self)

    def _end(self, index: int) -> int:
        return self._starts[index] + self.sheet.header.blocks[index].bytes


def _age(sheet: Sheet) -> tuple[int, int]:
    return sheet.header.origin.attempt, sheet.header.origin.step


def held(snapshots: Iterable[Snapshot]) -> tuple[Held, ...]:
    """By save, the newest first, whose snapshots these are."""
    saves: dict[str, list[Header]] = {}
    for snapshot in snapshots:
        saves.setdefault(snapshot.header.save_id, []).append(snapshot.header)
    found = [
        Held(
            save_id=save_id,
            run_uid=headers[0].origin.run_uid,
            attempt=headers[0].origin.attempt,
            step=headers[0].origin.step,
            tokens=headers[0].origin.tokens,
            world_size=headers[0].world_size,
            ranks=tuple(sorted({header.rank for header in headers})),
            lineage=headers[0].origin.lineage,
        )
        for save_id, headers in saves.items()
    ]
    return tuple(sorted(found, key=lambda each: (each.attempt, each.step, each.save_id), reverse=True))
