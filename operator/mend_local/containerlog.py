"""A container's log: lines with RFC 3339 times in files of bounded size, to be read with a tail and followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

MAX_LINE_BYTES: Final = 16 * 1024  # longer lines are cut into several, as container runtimes do
READ_BYTES: Final = 256 * 1024
_TIME_BYTES: Final = len("2026-01-02T03:04:05.000006Z ")


@dataclass(frozen=True, slots=True)
class LogQuery:
    """What a reader wants, with the names that Kubernetes gives the options of `log`."""

    tail_lines: int | None = None
    since: datetime | None = None
    limit_bytes: int | None = None
    timestamps: bool = False


class ContainerLog:
    """Writes what comes out of a pipe; the newest `max_bytes`, and at most as much again before them, are kept."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # the container was started anew: what it said before is the previous log
            path.replace(previous(path))
            older(path).unlink(missing_ok=True)
        self._path = path
        self._max_bytes = max_bytes
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._partial = b""

    def write(self, chunk: bytes) -> None:
        """Take output as it comes; a line is written when its end has come."""
        lines = (self._partial + chunk).split(b"\n")
        self._partial = lines.pop()
        while len(self._partial) >= MAX_LINE_BYTES:
            lines.append(self._partial[:MAX_LINE_BYTES])
            self._partial = self._partial[MAX_LINE_BYTES:]
        self._write_lines(lines)

    def close(self) -> None:
        """Write a last line that has no end, and close."""
        if self._partial:
            self._write_lines([self._partial])
        self._file.close()

    def _write_lines(self, lines: list[bytes]) -> None:
        if not lines:
            return
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()
        block = b"".join(stamp + line + b"\n" for line in lines)
        if self._size and self._size + len(block) > self._max_bytes:
            self._file.close()
            self._path.replace(older(self._path))
            self._file = self._path.open("ab", buffering=0)
            self._size = 0
        self._file.write(block)
        self._size += len(block)


def older(path: Path) -> Path:
    """Where the log goes when it is full."""
    return path.with_name(path.name + ".1")


def previous(path: Path) -> Path:
    """Where the log is of the container's run before its last restart."""
    return path.with_suffix(".previous.log")


def lines_of(path: Path) -> Iterator[bytes]:
    """The whole log, oldest line first, each with its time and newline."""
    for each in (older(path), path):
        try:
            with each.open("rb") as file:
                yield from file
        except FileNotFoundError:
            continue


def read_log(path: Path, query: LogQuery) -> bytes:
    """What `query` asks for of what has been written so far."""
    lines: list[bytes] = list(lines_of(path))
    if query.since is not None:
        since = query.since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
        lines = [line for line in lines if line[: _TIME_BYTES - 1] >= since]
    if query.tail_lines is not None:
        lines = lines[len(lines) - min(query.tail_lines, len(lines)) :]
    text = b"".join(_shown(line, query) for line in lines)
    return text if query.limit_bytes is None else text[: query.limit_bytes]


def _shown(line: bytes, query: LogQuery) -> bytes:
    return line if query.timestamps else line[_TIME_BYTES:]


async def follow_log(
    path: Path, query: LogQuery, is_open: asyncio.Event, *, poll_seconds: float = 0.05
) -> AsyncIterator[bytes]:
    """The log so far and then what comes, until `is_open` is cleared and everything has been read."""
    inode, offset = _end_of(path)
    text = read_log(path, query)  # in the same turn of the event loop: nothing is written in between
    yield text
    while True:
        was_open = is_open.is_set()
        place = next((each for each in (path, older(path), previous(path)) if _end_of(each)[0] == inode), path)
        block = _read_from(place, offset, query)
        offset += len(block.raw)
        if block.shown:
            yield block.shown
        if place == older(path):  # it was full: go on in its successor, at once
            inode, offset = _end_of(path)[0], 0
        elif not was_open or place == previous(path):  # the next run of the container is another log
            return
        else:
            await asyncio.sleep(poll_seconds)


def _end_of(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_ino, stat.st_size


@dataclass(frozen=True, slots=True)
class _Block:
    raw: bytes
    shown: bytes


def _read_from(path: Path, offset: int, query: LogQuery) -> _Block:
    """The whole lines after `offset`."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read()
    except FileNotFoundError:
        raw = b""
    raw = raw[: raw.rfind(b"\n") + 1]
    return _Block(raw, b"".join(_shown(line + b"\n", query) for line in raw.split(b"\n")[:-1]))
