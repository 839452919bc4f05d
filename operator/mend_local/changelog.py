"""The log that makes the objects survive: one JSON line per change, rewritten now and then to what is still alive.

Rather than sqlite: replaying lines also gives watches their history back, so clients of a restarted server resume
where they were instead of listing everything again; and a user can read the file. Every line reaches the kernel before
the client hears of its write, so a kill -9 loses nothing; a power failure may lose the last seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

COMPACT_ABOVE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: the object as stored under `version`; `value` None means deleted."""

    version: int
    resource: str
    key: tuple[str, str]
    value: dict[str, Any] | None


class CorruptLog(ValueError):
    """A line in the middle of the log is not one of ours."""


class ChangeLog:
    """An append-only file; `load` it once, then `append`."""

    def __init__(self, path: Path, *, compact_above_bytes: int = COMPACT_ABOVE_BYTES) -> None:
        self.path = path
        self.discarding = False  # a fault for tests: changes are answered but not kept
        self._limit = compact_above_bytes
        self._threshold = compact_above_bytes
        self._size = 0
        self._file: IO[bytes] | None = None

    def load(self) -> tuple[int, list[Entry]]:
        """Everything in the log and the version up to which it was compacted; a torn last line is cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        raw = self.path.read_bytes() if self.path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        compacted_at = 0
        entries = []
        for number, line in enumerate(whole.splitlines(), start=1):
            record = _decode(line, self.path, number)
            if "compacted" in record:
                compacted_at = record["compacted"]
                continue
            namespace, name = record["k"]
            entries.append(Entry(record["v"], record["r"], (namespace, name), record.get("o")))
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(len(whole))
        self._size = len(whole)
        return compacted_at, entries

    @property
    def wants_compaction(self) -> bool:
        """Whether the log has outgrown what it has to tell."""
        return self._size > self._threshold and not self.discarding

    def append(self, entry: Entry) -> None:
        """Hand one change to the kernel."""
        if self.discarding or self._file is None:
            return
        self._size += self._file.write(_encode(entry))

    def compact(self, version: int, alive: Iterable[Entry]) -> None:
        """Replace the log by the objects that are alive at `version`."""
        fresh = self.path.with_suffix(".compacting")
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode({"compacted": version}) + b"\n")
            for entry in alive:
                file.write(_encode(entry))
            file.flush()
            os.fsync(file.fileno())
            self._size = file.tell()
        fresh.replace(self.path)
        self._threshold = max(self._limit, 2 * self._size)
        self.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _encode(entry: Entry) -> bytes:
    record: dict[str, Any] = {"v": entry.version, "r": entry.resource, "k": entry.key}
    if entry.value is not None:
        record["o"] = entry.value
    return msgspec.json.encode(record) + b"\n"


def _decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CorruptLog(f"{path}, line {number}: {error}; remove the file to start with an empty cluster") from error
