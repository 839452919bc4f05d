"""Other workers' memory as a source to restore from: each range proven, the next holder where one fails."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import msgspec

from mend.states import Holder
from mend.store import NotFound
from mend_trainer.checkpoint.layout import starts
from mend_trainer.checkpoint.sources import Sheet
from mend_trainer.checkpoint.writer import digest_of
from mend_trainer.copies.client import Connection, Unreachable
from mend_trainer.copies.credentials import read_credentials
from mend_trainer.copies.sheets import decode_sheet
from mend_trainer.copies.tls import RunTls
from mend_trainer.copies.wire import Refused

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 8  # kept open to each holder
_PAUSES: Final = (0.0, 0.1, 0.5)  # before each round of asking; a saver that died is back, or busy, that soon
_KEY: Final = re.compile(r"([0-9a-f]+)/(\d+)\.(?:sheet|data)", re.ASCII)

Result = TypeVar("Result")


def connect(holders: Sequence[Holder]) -> PeerSource | None:
    """With what the environment holds; None if this process was not given what it needs."""
    credentials = read_credentials()
    return PeerSource(holders, credentials.tls, credentials.token) if credentials else None


class PeerSource:
    """A `Source` over the `holders` of a launch; may be used by several threads at once.

    What none of them gives is `NotFound`, with the reason of each: a worker that is silent, or whose memory is damaged,
    proves nothing about a checkpoint, so nothing is ever condemned by it.
    """

    def __init__(self, holders: Sequence[Holder], tls: RunTls, token: str) -> None:
        self._holders = tuple(holder for holder in holders if holder.url)
        self._tls, self._token = tls, token
        self._sheets: dict[str, Sheet] = {}
        self._idle: dict[str, list[Connection]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        """A snapshot's sheet."""
        return msgspec.json.encode(self._sheet(key))

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        """A snapshot's bytes from `start` on; all blocks that lie within have been proven."""
        save_id, rank = _parse(key)
        sheet = self._sheet(key)

        def ask(connection: Connection) -> None:
            connection.read_into(save_id, rank, start, into)
            if problem := _unproven(sheet, start, into):
                raise Refused(f"{connection.url}: {problem}")

        self._first(key, ask)

    def close(self) -> None:
        """Done."""
        with self._lock:
            for connection in (each for connections in self._idle.values() for each in connections):
                connection.close()
            self._idle.clear()

    def _sheet(self, key: str) -> Sheet:
        save_id, rank = _parse(key)
        place = f"{save_id}/{rank}"

        def ask(connection: Connection) -> Sheet:
            sheet = decode_sheet(connection.sheet(save_id, rank))
            if (sheet.header.save_id, sheet.header.rank) != (save_id, rank):
                raise Refused(f"{connection.url}: it gave the sheet of another snapshot")
            return sheet

        if place not in self._sheets:
            self._sheets[place] = self._first(key, ask)
        return self._sheets[place]

    def _first(self, key: str, ask: Callable[[Connection], Result]) -> Result:
        urls = dict.fromkeys(each.url for each in self._holders if (each.save_id, each.rank) == _parse(key))
        problems: dict[str, str] = {}
        for pause in _PAUSES:
            if not urls:
                break
            time.sleep(pause)
            for url in list(urls):
                try:
                    with self._connection(url) as connection:
                        return ask(connection)
                except (Refused, Unreachable) as error:
                    log.warning("%s: %s", key, error)
                    problems[url] = str(error)
                    if not isinstance(error, Unreachable) or error.was_silent:
                        del urls[url]  # it would say, or not say, the same again
        raise NotFound(key, "; ".join(problems.values()) or "no worker is known to hold it")

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


def _parse(key: str) -> tuple[str, int]:
    found = _KEY.fullmatch(key)
    if found is None:
        raise NotFound(key, "no key of a snapshot in memory")
    return found[1], int(found[2])


def _unproven(sheet: Sheet, start: int, room: memoryview) -> str:
    """Which block in this range does not have its digest; "" if all have."""
    end = start + len(room)
    for begin, block, digest in zip(starts(sheet.header.blocks), sheet.header.blocks, sheet.digests, strict=True):
        within = start <= begin and begin + block.bytes <= end
        if within and digest_of(room[begin - start : begin - start + block.bytes]) != digest:
            return f"{block.name}: the bytes do not have their digest"
    return ""
