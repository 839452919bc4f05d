"""What lies in a worker's memory: its own ranks' snapshots, and the copies of its buddy's that it takes in."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus

from mend.protocol import Held
from mend_trainer.checkpoint.arena import Arena, Draft, Snapshot
from mend_trainer.checkpoint.layout import starts
from mend_trainer.checkpoint.writer import digest_of
from mend_trainer.copies.offers import Offer, decode_offer, encode_offer, offer_of
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
    ) -> None:
        self.own, self._copies = tuple(own), tuple(copies)
        self.run_uid = run_uid
        self._room_for = room_for
        self._lock = threading.Lock()
        self._coming: dict[Arena, ComingCopy] = {}

    # ------------------------------------------------------------ what is here
    def held(self) -> tuple[Held, ...]:
        """All that lies whole here, the newest save first."""
        saves: dict[str, list[Snapshot]] = {}
        for snapshot, _ in self._found():
            saves.setdefault(snapshot.header.save_id, []).append(snapshot)
        held = [_held(snapshots) for snapshots in saves.values()]
        return tuple(sorted(held, key=lambda each: (each.attempt, each.step, each.save_id), reverse=True))

    def find(self, save_id: str, rank: int) -> KeptSnapshot | None:
        """The snapshot of that rank of that save, its own rank's or a copy."""
        for snapshot, offer in self._found():
            if (snapshot.header.save_id, snapshot.header.rank) == (save_id, rank):
                return KeptSnapshot(snapshot, offer)
        return None

    def _found(self) -> Iterator[tuple[Snapshot, Offer]]:
        for arena in (*self.own, *self._copies):
            for snapshot in arena.snapshots():
                if offer := offer_of(snapshot):
                    yield snapshot, offer

    # ------------------------------------------------------------ what is coming
    def take(self, header: bytes) -> ComingCopy:
        """Room for the copy that this header offers; raises `Refused` where a newer one is kept, or none fits."""
        offer = decode_offer(header)
        with self._lock:
            self._check_run(offer)
            arena = self._arena_for(offer)
            self._check_age(offer, arena)
            self._check_room(offer, arena)
            draft = arena.begin(offer.header.blocks)
            assert draft is not None, "copies are owed to nobody"
            coming = self._coming[arena] = ComingCopy(self, arena, draft, offer)
        return coming

    def let_go(self, coming: ComingCopy) -> None:
        """The transfer is over, one way or the other."""
        with self._lock:
            if self._coming.get(coming.arena) is coming:
                del self._coming[coming.arena]

    def _check_run(self, offer: Offer) -> None:
        if offer.header.origin.run_uid != self.run_uid:
            raise Refused(f"a snapshot of run {offer.header.origin.run_uid!r}; this is a worker of {self.run_uid!r}")

    def _arena_for(self, offer: Offer) -> Arena:
        """That of the rank; else an empty one, else that of a rank which the newer attempt does not have here."""
        ranks = {arena: self._rank_in(arena) for arena in self._copies}
        mine = [arena for arena in self._copies if ranks[arena] == offer.header.rank]
        empty = [arena for arena in self._copies if ranks[arena] is None]
        old = [arena for arena in self._copies if self._newest(arena) < (offer.header.origin.attempt, -1)]
        for arena in (*mine, *empty, *sorted(old, key=self._newest)):
            return arena
        raise Refused(
            f"room for copies of {len(self._copies)} ranks, and all is taken", HTTPStatus.INSUFFICIENT_STORAGE
        )

    def _check_age(self, offer: Offer, arena: Arena) -> None:
        age = _age(offer)
        if any(snapshot.header.save_id == offer.header.save_id for snapshot in arena.snapshots()):
            raise Refused("it is kept already", HTTPStatus.ALREADY_REPORTED)
        if (newest := self._newest(arena)) >= age:
            raise Refused(f"attempt {age[0]} step {age[1]}: attempt {newest[0]} step {newest[1]} is kept already")
        coming = self._coming.get(arena)
        if coming is not None:
            if _age(coming.offer) < age:
                coming.cancel()
            raise Refused("another transfer of this rank is under way; ask again", HTTPStatus.SERVICE_UNAVAILABLE)

    def _check_room(self, offer: Offer, arena: Arena) -> None:
        more = 2 * offer.bytes - os.fstat(arena.descriptor).st_blocks * 512
        if more > 0 and (problem := self._room_for(more)):
            log.warning("a copy of rank %d is refused: %s", offer.header.rank, problem)
            raise Refused(problem, HTTPStatus.INSUFFICIENT_STORAGE)

    def _rank_in(self, arena: Arena) -> int | None:
        if arena in self._coming:
            return self._coming[arena].offer.header.rank
        snapshots = arena.snapshots()
        return snapshots[-1].header.rank if snapshots else None

    def _newest(self, arena: Arena) -> tuple[int, int]:
        """Attempt and step of the newest copy in it."""
        origins = [snapshot.header.origin for snapshot in arena.snapshots()]
        return max(((origin.attempt, origin.step) for origin in origins), default=(-1, -1))


class KeptSnapshot:
    """A snapshot as the server sends it."""

    def __init__(self, snapshot: Snapshot, offer: Offer) -> None:
        self._snapshot, self._offer = snapshot, offer
        self.data = snapshot.data

    @property
    def header(self) -> bytes:
        """As it goes over the wire."""
        return encode_offer(self._offer)

    def is_whole(self) -> bool:
        """Whether nobody has begun to overwrite it."""
        return self._snapshot.is_whole


class ComingCopy:
    """A copy on its way into its slot, which is torn until all is there and proven."""

    def __init__(self, shelf: ArenaShelf, arena: Arena, draft: Draft, offer: Offer) -> None:
        self.arena, self.offer = arena, offer
        self.bytes = offer.bytes
        self.room = draft.data
        self._shelf, self._draft = shelf, draft
        self._starts = starts(offer.header.blocks)
        self._came = 0
        self._proven = 0  # blocks
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody wants it any more; said by another thread."""
        self._cancelled = True

    def came(self, length: int) -> None:
        """So many bytes more; each block is proven as soon as it is there, while the cache still has its end."""
        if self._cancelled:
            raise Refused("a newer snapshot is offered")
        self._came += length
        blocks = self.offer.header.blocks
        while self._proven < len(blocks) and self._end(self._proven) <= self._came:
            if digest_of(self._draft.raw(self._proven)) != self.offer.digests[self._proven]:
                name = blocks[self._proven].name[:80]
                raise Refused(f"{name}: the bytes do not have their digest", HTTPStatus.UNPROCESSABLE_ENTITY)
            self._proven += 1

    def publish(self) -> None:
        """From now on it is held."""
        self.came(0)
        assert self._proven == len(self.offer.header.blocks)
        self._draft.publish(self.offer.header, owed=False).add_digests(self.offer.digests)
        self._shelf.let_go(self)

    def drop(self) -> None:
        """It broke off: the slot stays torn, and the next copy goes there."""
        self._shelf.let_go(self)

    def _end(self, index: int) -> int:
        return self._starts[index] + self.offer.header.blocks[index].bytes


def _age(offer: Offer) -> tuple[int, int]:
    return offer.header.origin.attempt, offer.header.origin.step


def _held(snapshots: Sequence[Snapshot]) -> Held:
    header = snapshots[0].header
    return Held(
        save_id=header.save_id,
        run_uid=header.origin.run_uid,
        attempt=header.origin.attempt,
        step=header.origin.step,
        tokens=header.origin.tokens,
        world_size=header.world_size,
        ranks=tuple(sorted({snapshot.header.rank for snapshot in snapshots})),
        lineage=header.origin.lineage,
    )
