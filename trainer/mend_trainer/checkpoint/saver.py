"""The saver of a worker: digests each snapshot, saves those that are owed, and tells what it has.

It keeps nothing that its successor would need: the arenas say what is owed, the store how far it has come.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from mend.reports import Committed, SaveFailed
from mend.store import Store, StoreError, open_store
from mend.verify import leave_note, verify
from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.checkpoint.saving import Outcome, Saving
from mend_trainer.checkpoint.signing import key_of
from mend_trainer.checkpoint.writer import digest_all
from mend_trainer.copies.exchange import Exchange
from mend_trainer.copies.shelf import held
from mend_trainer.polling import is_writable, readable
from mend_trainer.savers import MESSAGE_BYTES, Came, Holding, Said, decode_guide

_LOOK_SECONDS: Final = 0.5  # a look without having been told: it costs microseconds
_TELL_SECONDS: Final = 1.0  # an agent that is frozen is not waited for
_NICENESS: Final = 10

_log = logging.getLogger(__name__)
_Place = tuple[int, int]  # which arena, which sequence


class Saver:
    """One worker's. `look` is called whenever there may be something new; each save goes on in a thread of its own."""

    def __init__(
        self,
        arenas: Sequence[Arena],
        tell: Callable[[Said], None],
        open_at: Callable[[str, str | None], Store] = open_store,
        exchange: Exchange | None = None,
    ) -> None:
        self._arenas = arenas
        self._exchange = exchange
        self._tell = tell
        self._open = open_at
        self._stores: dict[tuple[str, str | None], Store] = {}
        self._saving: dict[_Place, threading.Thread] = {}
        self._weights: dict[int, _Weights] = {}  # of each arena's last save
        self._resumes = True  # at the first look: what is owed then may have been begun by another saver
        self._reading_back: threading.Thread | None = None
        self._lock = threading.Lock()
        self._settled = 0  # snapshots
        self._moved: tuple[int, ...] = ()  # what of saving was seen to move, when last looked at
        self._told = Holding()

    def look(self) -> None:
        """Digest what is new, begin to save what is owed."""
        self._show_life()
        for number, arena in enumerate(self._arenas):
            for snapshot in arena.snapshots():
                digests = snapshot.digests or self._digest(snapshot)
                place = number, snapshot.sequence
                if digests is not None and snapshot.is_owed and place not in self._saving:
                    self._begin(place, snapshot, digests)
            self._copy_newest(arena)
        self._resumes = False
        self._say_what_is_held()

    def tell_anew(self) -> None:
        """What was told last was not heard: what is held is told again at the next look."""
        self._told = Holding()

    @property
    def is_busy(self) -> bool:
        """Whether anything is being saved."""
        return any(thread.is_alive() for thread in self._saving.values())

    def _digest(self, snapshot: Snapshot) -> tuple[str, ...] | None:
        digests = tuple(digest_all(snapshot, self._arenas[0].words.turn))
        if not snapshot.is_whole:
            return None
        snapshot.add_digests(digests)
        return digests

    def _begin(self, place: _Place, snapshot: Snapshot, digests: tuple[str, ...]) -> None:
        weights = _Weights(snapshot, digests)
        before, self._weights[place[0]] = self._weights.get(place[0]), weights
        unchanged = 0 if before is None or snapshot.header.may_repeat else weights.unchanged_since(before)
        for old in [old for old, thread in self._saving.items() if not thread.is_alive()]:
            del self._saving[old]
        thread = threading.Thread(
            target=self._save, args=(snapshot, digests, unchanged, self._resumes), name="mend-save", daemon=True
        )
        self._saving[place] = thread
        thread.start()

    def _save(self, snapshot: Snapshot, digests: tuple[str, ...], unchanged: int, resumed: bool) -> None:
        header = snapshot.header
        outcome: Outcome
        try:
            saving = Saving(
                self._store_of(header.uri, header.endpoint),
                snapshot,
                digests,
                unchanged=unchanged,
                resumed=resumed,
                complain=lambda failed: self._say(snapshot, failed),
            )
            outcome = saving.run()
        except Exception as error:  # noqa: BLE001 - a slot that is never settled would stop all saving
            _log.exception("the save at step %d broke off", header.origin.step)
            outcome = SaveFailed(step=header.origin.step, error=f"{type(error).__name__}: {error}")
        with self._lock:
            if not isinstance(outcome, SaveFailed):
                reached = header.origin.attempt, header.origin.step
                snapshot.arena.words.committed = max(snapshot.arena.words.committed, reached)
        snapshot.settle(msgspec.json.encode(outcome))
        with self._lock:
            self._settled += 1
        self._say(snapshot, outcome)
        if isinstance(outcome, Committed) and header.verify and header.rank == 0:
            self._begin_reading_back(snapshot, outcome)

    def _begin_reading_back(self, snapshot: Snapshot, committed: Committed) -> None:
        """In a thread that nobody waits for: neither the next save nor the end of this process. One at a time."""
        if self._reading_back is not None and self._reading_back.is_alive():
            _log.warning("step %d is not read back: the one before still is", committed.checkpoint.step)
            return
        thread = threading.Thread(target=self._read_back, args=(snapshot, committed), name="mend-verify", daemon=True)
        self._reading_back = thread
        thread.start()

    def _read_back(self, snapshot: Snapshot, committed: Committed) -> None:
        header, ref = snapshot.header, committed.checkpoint
        store = self._store_of(header.uri, header.endpoint)
        folder = ref.uri.removeprefix(f"{store.uri}/")
        try:
            found = verify(store, folder, key_of(header.origin.run))
            leave_note(store, folder, found, time.time())
        except StoreError as error:
            _log.warning("step %d could not be read back: %s", ref.step, error)
            return
        if found.is_damaged:
            problem = "; ".join(found.problems)
            self._say(snapshot, SaveFailed(step=ref.step, error=f"what was committed is not what was saved: {problem}"))

    def _say(self, snapshot: Snapshot, outcome: Outcome) -> None:
        origin = snapshot.header.origin
        if isinstance(outcome, SaveFailed):
            _log.error("rank %d: the save at step %d failed: %s", snapshot.header.rank, origin.step, outcome.error)
        if snapshot.header.rank == 0:
            self._tell(Came(attempt=origin.attempt, outcome=outcome))

    def _store_of(self, uri: str, endpoint: str | None) -> Store:
        with self._lock:
            if (uri, endpoint) not in self._stores:
                self._stores[uri, endpoint] = self._open(uri, endpoint)
            return self._stores[uri, endpoint]

    def _copy_newest(self, arena: Arena) -> None:
        snapshots = [snapshot for snapshot in arena.snapshots() if snapshot.is_held]
        if snapshots and self._exchange is None:
            snapshots[-1].mark_copied()
        elif snapshots and self._exchange is not None:
            self._exchange.offer(snapshots[-1])

    def _show_life(self) -> None:
        """To the agent, which looks at the first arena: by this thread alone, as each word has one writer."""
        with self._lock:
            usages, moved = [store.usage for store in self._stores.values()], (self._settled,)
        now = (*moved, *(each for usage in usages for each in (usage.total, usage.handed_bytes)))
        if self._arenas:
            self._arenas[0].words.turn(moved=now != self._moved)
        self._moved = now

    def _say_what_is_held(self) -> None:
        snapshots = [each for arena in self._arenas for each in arena.snapshots()]
        snapshots += self._exchange.copies if self._exchange else []
        with self._lock:
            usages, settled = [store.usage for store in self._stores.values()], self._settled
        now = Holding(
            held=held([snapshot for snapshot in snapshots if snapshot.is_held]),
            settled=settled,
            requests=sum(usage.total for usage in usages),
            stored_bytes=sum(usage.sent_bytes for usage in usages),
        )
        if now != self._told:
            self._told = now
            self._tell(now)


class _Weights:
    """The digests of the model in one snapshot, by block."""

    def __init__(self, snapshot: Snapshot, digests: Sequence[str]) -> None:
        header = snapshot.header
        self.of = header.origin.run_uid, header.origin.attempt
        self.step = header.origin.step
        self.digests: Mapping[tuple[str, tuple[int, ...]], str] = {
            (block.name, block.offsets): digest
            for block, digest in zip(header.blocks, digests, strict=True)
            if block.path[0] == "model"
        }

    def unchanged_since(self, before: _Weights) -> int:
        """How many blocks are as they were in an earlier step of the same attempt."""
        if before.of != self.of or before.step >= self.step:
            return 0
        return sum(before.digests.get(block) == digest for block, digest in self.digests.items())


def serve(channel: socket.socket, arenas: Sequence[Arena], exchange: Exchange | None = None) -> None:
    """A saver's whole life: look when told to, and now and then. Once nobody tells any more, finish and return."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is owed is saved until nobody waits any longer

    is_unheard = False

    def tell(said: Said) -> None:
        nonlocal is_unheard
        try:
            is_writable(channel, _TELL_SECONDS)
            channel.send(msgspec.json.encode(said), socket.MSG_DONTWAIT)
        except OSError:  # nobody is there to hear it, or it does not listen: what came of a save is in the arenas too
            is_unheard = True

    saver = Saver(arenas, tell, exchange=exchange)
    saver.look()
    ears: list[socket.socket | int] = [channel, exchange.news] if exchange else [channel]
    while True:
        heard = readable(ears, _LOOK_SECONDS)
        if channel.fileno() in heard:
            if not (message := _heard(channel)):
                break
            if exchange:
                exchange.follow(decode_guide(message))
        if exchange and exchange.news in heard:
            exchange.hear()
        if is_unheard:
            is_unheard = False
            saver.tell_anew()
        saver.look()
    _let_go_of_output()
    saver.look()
    while saver.is_busy:
        time.sleep(_LOOK_SECONDS)


def _heard(channel: socket.socket) -> bytes:
    """The next message; nothing once nobody is there, also if they went without having read what was told them."""
    try:
        return channel.recv(MESSAGE_BYTES)
    except ConnectionResetError:
        return b""


def _let_go_of_output() -> None:
    """Who reads what the rank printed would otherwise wait for this process."""
    void = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(void, stream)


def main() -> None:
    """Entry of a saver that a rank without an agent has started: descriptors of its channel and its arena."""
    channel, *arenas = (int(word) for word in sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="mend saver: %(message)s")
    serve(socket.socket(fileno=channel), [Arena(descriptor) for descriptor in arenas])


if __name__ == "__main__":
    main()
