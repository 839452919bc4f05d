"""Gets a snapshot from whichever worker holds it: by ranges, each proven, and from the next holder where one fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

from mend.protocol import Holder
from mend_trainer.copies.client import Connection, Unreachable
from mend_trainer.copies.offers import Offer, decode_offer
from mend_trainer.copies.tls import RunTls
from mend_trainer.copies.wire import Refused

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 4  # kept open to each holder

Result = TypeVar("Result")


class NobodyHolds(ConnectionError):
    """None of the holders gave the snapshot; the message has each one's reason. Nothing is condemned by it."""


class Fetcher:
    """Asks holders; may be used by several threads at once."""

    def __init__(self, holders: Sequence[Holder], tls: RunTls, token: str) -> None:
        self._holders = tuple(holder for holder in holders if holder.url)
        self._tls, self._token = tls, token
        self._idle: dict[str, list[Connection]] = {}
        self._lock = threading.Lock()

    def offer(self, save_id: str, rank: int) -> Offer:
        """Header and digests of a snapshot; raises `NobodyHolds`."""

        def ask(connection: Connection) -> Offer:
            offer = decode_offer(connection.header(save_id, rank))
            if (offer.header.save_id, offer.header.rank) != (save_id, rank):
                raise Refused(f"{connection.url}: the header of another snapshot")
            return offer

        return self._first(save_id, rank, ask)

    def read_into(self, save_id: str, rank: int, start: int, room: memoryview, proof: Callable[[], bool]) -> None:
        """The snapshot's bytes from `start` on; `proof` says whether what came is right. Raises `NobodyHolds`."""

        def ask(connection: Connection) -> None:
            connection.read_into(save_id, rank, start, room)
            if not proof():
                raise Refused(f"{connection.url}: bytes {start}..{start + len(room)} do not have their digests")

        self._first(save_id, rank, ask)

    def close(self) -> None:
        """Done."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def _first(self, save_id: str, rank: int, ask: Callable[[Connection], Result]) -> Result:
        problems: list[str] = []
        for url in dict.fromkeys(each.url for each in self._holders if (each.save_id, each.rank) == (save_id, rank)):
            try:
                with self._connection(url) as connection:
                    return ask(connection)
            except (Refused, Unreachable) as error:
                log.warning("rank %d of save %s: %s", rank, save_id, error)
                problems.append(str(error))
        raise NobodyHolds(f"rank {rank} of save {save_id}: {'; '.join(problems) or 'no worker is known to hold it'}")

    @contextmanager
    def _connection(self, url: str) -> Iterator[Connection]:
        with self._lock:
            idle = self._idle.setdefault(url, [])
            idle[:] = [connection for connection in idle if connection.is_fresh]
            connection = idle.pop() if idle else Connection(url, self._tls, self._token)
        yield connection  # one that failed has closed itself, and is not kept
        with self._lock:
            if len(idle) < _CONNECTIONS:
                idle.append(connection)
                return
        connection.close()
