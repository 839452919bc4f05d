"""Sends each rank's newest snapshot to the buddy, at a pace that leaves the network to the training.

One thread, one transfer at a time, nothing queued: when a transfer is over, what is newest then goes next, and what
came between is skipped. A snapshot that its rank overwrites meanwhile is given up; the buddy's digests tell as well.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Final

from mend_trainer.checkpoint.arena import Snapshot
from mend_trainer.checkpoint.sources import sheet_of
from mend_trainer.copies.client import Connection, Unreachable, pieces_of
from mend_trainer.copies.sheets import encode_sheet, size_of
from mend_trainer.copies.throttle import Throttle
from mend_trainer.copies.tls import RunTls
from mend_trainer.copies.wire import PIECE_BYTES, Refused

log = logging.getLogger(__name__)

_PAUSES: Final = (0.1, 5.0)  # first and longest before the buddy is tried again
_SLOWEST_BYTES_PER_SECOND: Final = 1 << 20  # a transfer that takes longer than so, though it may go faster, is given up
_LEAST_SECONDS: Final = 10.0


class _GivenUp(Exception):
    """The transfer is of no use any more, and why."""


class Sender:
    """Keeps the buddy's copies new. `offer` and `follow` come from any thread and wait for nothing."""

    def __init__(self, tls: RunTls, token: str) -> None:
        self._tls, self._token = tls, token
        self._news = threading.Condition()
        self._newest: dict[int, Snapshot] = {}  # by rank; not yet sent, in the order of their coming
        self._buddy = ""
        self._throttle = Throttle(0)
        self._is_sending = False
        self._closed = False
        self.trouble = ""  # why the last copy did not go
        self.sent = 0  # snapshots
        self.skipped = 0  # snapshots that a newer one replaced before their turn came
        self.sent_bytes = 0  # of snapshots, those included whose transfer broke off
        threading.Thread(target=self._work, name="mend-copies", daemon=True).start()

    def follow(self, buddy: str, bytes_per_second: int) -> None:
        """From now on copies go there ("": nowhere); a transfer to another place ends."""
        with self._news:
            if buddy != self._buddy:
                self._newest.clear()
                self.trouble = ""
            self._buddy, self._throttle = buddy, Throttle(bytes_per_second)
            self._news.notify_all()

    @property
    def is_idle(self) -> bool:
        """Whether all that was offered has gone or been given up."""
        with self._news:
            return not self._newest and not self._is_sending

    def offer(self, snapshot: Snapshot) -> None:
        """A new snapshot, with its digests; takes the place of one of the same rank that is not sent yet."""
        with self._news:
            if self.trouble:
                snapshot.mark_copied()
            if self._buddy:
                self.skipped += self._newest.pop(snapshot.header.rank, None) is not None
                self._newest[snapshot.header.rank] = snapshot
                self._news.notify_all()

    def close(self) -> None:
        """Send no more."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    # ------------------------------------------------------------ the thread
    def _work(self) -> None:
        pause = _PAUSES[0]
        while (taken := self._next()) is not None:
            buddy, throttle, snapshot = taken
            try:
                self._send(buddy, throttle, snapshot)
                snapshot.mark_copied()
                self.sent += 1
                pause = _PAUSES[0]
                self._tell("")
            except _GivenUp as given_up:
                log.info("%s: given up: %s", _name(snapshot), given_up)
                snapshot.mark_copied()
            except Refused as refused:
                if refused.status is HTTPStatus.SERVICE_UNAVAILABLE:
                    self._again(buddy, snapshot, pause)
                    continue
                snapshot.mark_copied()
                if refused.status is not HTTPStatus.ALREADY_REPORTED:
                    self._tell(f"the buddy refuses a copy: {refused}")
            except Unreachable as error:
                snapshot.mark_copied()  # the training does not wait for who is away
                self._tell(f"no copy can be sent to the buddy: {error}")
                self._again(buddy, snapshot, pause)
                pause = min(2 * pause, _PAUSES[1])
            except Exception as error:
                snapshot.mark_copied()  # and the thread goes on: without it none would ever count as copied again
                log.exception("%s: it broke off", _name(snapshot))
                self._tell(f"copies break off: {type(error).__name__}: {error}")

    def _next(self) -> tuple[str, Throttle, Snapshot] | None:
        with self._news:
            self._is_sending = False
            while not self._closed:
                for rank in list(self._newest):
                    snapshot = self._newest.pop(rank)
                    if snapshot.is_whole:
                        self._is_sending = True
                        return self._buddy, self._throttle, snapshot
                self._news.wait()
            return None

    def _again(self, buddy: str, snapshot: Snapshot, pause: float) -> None:
        """Keep it for another try, unless there is a newer one or another buddy; then wait a little."""
        with self._news:
            if buddy == self._buddy:
                self._newest.setdefault(snapshot.header.rank, snapshot)
                self._news.wait_for(lambda: self._closed or self._buddy != buddy, pause * random.uniform(0.5, 1.0))

    def _send(self, buddy: str, throttle: Throttle, snapshot: Snapshot) -> None:
        sheet = sheet_of(snapshot)
        if sheet is None:
            raise _GivenUp("it is overwritten")
        connection = Connection(buddy, self._tls, self._token)
        try:
            pieces = self._paced(buddy, throttle, snapshot)
            others = [each.header.save_id for each in snapshot.arena.snapshots() if each.slot != snapshot.slot]
            connection.send(
                encode_sheet(sheet),
                pieces,
                size_of(sheet),
                beside=others[0] if others else "",
                before_answer=self._check(buddy, snapshot),
            )
        finally:
            connection.close()

    def _paced(self, buddy: str, throttle: Throttle, snapshot: Snapshot) -> Iterator[memoryview]:
        check = self._check(buddy, snapshot)
        pace = min(throttle.bytes_per_second / 2 or _SLOWEST_BYTES_PER_SECOND, _SLOWEST_BYTES_PER_SECOND)
        give_up_at = time.monotonic() + _LEAST_SECONDS + len(snapshot.data) / pace
        for piece in pieces_of(snapshot.data, throttle.piece_bytes(PIECE_BYTES)):
            with self._news:
                self._news.wait_for(lambda: self._is_over(buddy), throttle.book(len(piece)))
            check()
            if time.monotonic() > give_up_at:
                raise Unreachable(f"{buddy}: it takes copies too slowly")
            yield piece
            self.sent_bytes += len(piece)

    def _check(self, buddy: str, snapshot: Snapshot) -> Callable[[], None]:
        def check() -> None:
            if self._is_over(buddy):
                raise _GivenUp("there is another buddy now")
            if not snapshot.is_whole:
                raise _GivenUp("its rank has overwritten it")

        return check

    def _is_over(self, buddy: str) -> bool:
        return self._closed or buddy != self._buddy

    def _tell(self, trouble: str) -> None:
        """Log what changes."""
        if bool(trouble) != bool(self.trouble):
            log.warning("%s", trouble) if trouble else log.info("copies reach the buddy again")
        self.trouble = trouble


def _name(snapshot: Snapshot) -> str:
    origin = snapshot.header.origin
    return f"copy of rank {snapshot.header.rank}, attempt {origin.attempt} step {origin.step}"
