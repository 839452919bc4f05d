"""A folder as a store: objects are files, written beside their place, synced, and moved there in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from mend.store.api import Data, Entry, Probe, Unfinished, pieces, size
from mend.store.errors import AlreadyExists, Changed, Forbidden, Full, NotFound, StoreError, Unreachable, WrongAnswer
from mend.store.probe import probe
from mend.store.retry import until
from mend.store.usage import Meter, Usage

_UNFINISHED: Final = ".mend-unfinished-"
_MAX_CALL_BYTES: Final = 1 << 26
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_TRANSIENT: Final = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN})


class FileStore:
    """`file:///path`. An ETag is the file's change time and size: weaker than a digest, enough to see a replacement."""

    def __init__(self, root: Path, deadline_seconds: float) -> None:
        self.root = root
        self.uri = f"file://{root}"
        self._deadline_seconds = deadline_seconds
        self._meter = Meter()

    @property
    def usage(self) -> Usage:
        return self._meter.read()

    def put(self, key: str, data: Data) -> str:
        return until(self._deadline_seconds, lambda: self._write(key, data, os.replace))

    def put_if_absent(self, key: str, data: Data) -> str:
        try:
            return until(self._deadline_seconds, lambda: self._write(key, data, os.link))
        except AlreadyExists:
            if self.get(key) == b"".join(pieces(data)):  # written by an earlier try whose success was not seen
                return self.head(key).etag
            raise

    def get(self, key: str, start: int = 0, length: int | None = None, if_match: str = "") -> bytes:
        if length is None:
            length = max(0, self.head(key).bytes - start)
        buffer = bytearray(length)
        self.get_into(key, memoryview(buffer), start, if_match)
        return bytes(buffer)

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        until(self._deadline_seconds, lambda: self._read(key, into, start, if_match))

    def head(self, key: str) -> Entry:
        with self._translated(key):
            return _entry(key, (self.root / key).stat())

    def list(self, prefix: str = "", delimiter: str = "", after: str = "") -> Iterator[Entry]:
        self._meter.count("list")
        folder = prefix.rpartition("/")[0]
        for entry in self._walk(folder, deep=not delimiter):
            if entry.key.startswith(prefix) and entry.key > after:
                yield entry

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        folder = self.root / prefix.rpartition("/")[0]
        with self._translated(prefix):
            for path in sorted(folder.rglob(f"{_UNFINISHED}*")):
                key = str(path.with_name(_key_of(path.name)).relative_to(self.root))
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # ended meanwhile
                        yield Unfinished(key=key, begun_unix_seconds=path.stat().st_mtime, id=path.name)

    def abandon(self, unfinished: Unfinished) -> None:
        path = (self.root / unfinished.key).with_name(unfinished.id)
        with self._translated(unfinished.key):
            path.unlink(missing_ok=True)
        self._remove_empty(path.parent)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._meter.count("delete")
            path = self.root / key
            with self._translated(key), contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._remove_empty(path.parent)

    def probe(self) -> Probe:
        with self._translated(""):
            self.root.mkdir(parents=True, exist_ok=True)
        return probe(self)

    def _write(self, key: str, data: Data, settle: Callable[[Path, Path], None]) -> str:
        path = self.root / key
        unfinished = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}-{path.name}")
        self._meter.count("put", sent=size(pieces(data)))
        # A folder that a deletion has just emptied may vanish under a writer: then the write is tried again.
        with self._translated(key, missing_is_transient=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                etag = _write_synced(unfinished, data, self._meter.hand)
                settle(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
                self._remove_empty(path.parent)
            sync_folder(path.parent)
        return etag

    def _read(self, key: str, into: memoryview, start: int, if_match: str) -> None:
        into = into.cast("B")
        self._meter.count("get", received=into.nbytes)
        with self._translated(key), (self.root / key).open("rb", buffering=0) as file:
            found = _entry(key, os.fstat(file.fileno()))
            if if_match and found.etag != if_match:
                raise Changed(self._where(key), f"has ETag {found.etag}, not {if_match}")
            if found.bytes < start + into.nbytes:
                raise NotFound(
                    self._where(key), f"ends at byte {found.bytes}; {into.nbytes} from {start} on were wanted"
                )
            file.seek(start)
            while into.nbytes:
                read = file.readinto(into[:_MAX_CALL_BYTES])
                if not read:
                    raise NotFound(self._where(key), "was cut while it was read")
                into = into[read:]

    def _walk(self, folder: str, *, deep: bool) -> Iterator[Entry]:
        """Everything in a folder in the order of keys, which is not the order of a walk: "a.b" sorts before "a/b"."""
        found: list[Entry] = []
        pending = [folder]
        while pending:
            here = pending.pop()
            with self._translated(here), contextlib.suppress(FileNotFoundError), os.scandir(self.root / here) as items:
                for item in items:
                    key = f"{here}/{item.name}" if here else item.name
                    if item.is_dir():
                        pending += [key] if deep else []
                        found += [] if deep else [Entry(key=key + "/")]
                    elif not item.name.startswith(_UNFINISHED):
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile; the others are still there
                            found.append(_entry(key, item.stat()))
        yield from sorted(found, key=lambda entry: entry.key)

    def _remove_empty(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # the first folder that is not empty ends it
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    @contextlib.contextmanager
    def _translated(self, key: str, *, missing_is_transient: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translate(error, self._where(key), missing_is_transient) from error


def _key_of(unfinished: str) -> str:
    """The name that an unfinished file was to get."""
    return re.sub(rf"^{re.escape(_UNFINISHED)}[0-9a-f]*-?", "", unfinished)


def _translate(error: OSError, where: str, missing_is_transient: bool) -> StoreError:
    detail = error.strerror or str(error)
    match error.errno:
        case errno.EEXIST:
            return AlreadyExists(where, "there is such a file already")
        case errno.ENOENT if missing_is_transient:
            return Unreachable(where, detail, transient=True)
        case errno.ENOENT:
            return NotFound(where, "no such file")
        case code if code in _FULL:
            return Full(where, detail)
        case code if code in _FORBIDDEN:
            return Forbidden(where, detail, remedy="give the user of the pod read and write access to the folder")
        case code if code in _TRANSIENT:
            return Unreachable(where, detail, transient=True)
        case _:
            return WrongAnswer(where, detail, remedy="the path must be a folder on a file system that can link files")


def _entry(key: str, facts: os.stat_result) -> Entry:
    etag = f"{facts.st_mtime_ns:x}-{facts.st_size:x}"
    return Entry(key=key, bytes=facts.st_size, etag=etag, modified_unix_seconds=facts.st_mtime)


def _write_synced(path: Path, data: Data, hand: Callable[[int], None]) -> str:
    with path.open("xb", buffering=0) as file:
        for view in pieces(data):
            while view.nbytes:
                written = file.write(view[:_MAX_CALL_BYTES])
                hand(written)
                view = view[written:]
        os.fsync(file.fileno())
        return _entry("", os.fstat(file.fileno())).etag


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: what was renamed stays so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
