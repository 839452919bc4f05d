"""What mend asks of a store: a flat name space of immutable objects, written once or conditionally."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mend.store.usage import Usage

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer]  # a sequence is written as one object, without being joined first where possible


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a listing. A folder, with a delimiter, ends in "/" and has neither size nor ETag."""

    key: str  # relative to the store's prefix
    bytes: int = 0
    etag: str = ""
    modified_unix_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """An object whose writing began and has not ended. Its writer may be at work or gone: only its age tells."""

    key: str  # of the object that it was to become
    begun_unix_seconds: float  # by the store's clock
    id: str  # what the store knows it by


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a store turned out to be. Without conditional writes two writers can overwrite each other unnoticed."""

    conditional_writes: bool


class Store(Protocol):
    """A bucket or folder below one prefix; synchronous and thread-safe. Every method may raise a `StoreError`."""

    @property
    def uri(self) -> str:
        """The prefix that all keys are relative to, without a slash at its end."""
        ...

    @property
    def usage(self) -> Usage:
        """What it has cost since it was opened."""
        ...

    def put(self, key: str, data: Data) -> str:
        """Write an object, whole or not at all; its ETag. Where it can be, what an earlier try has sent is kept."""
        ...

    def put_if_absent(self, key: str, data: Data) -> str:
        """Write an object unless there is one (`AlreadyExists`, unless it holds these very bytes); its ETag."""
        ...

    def get(self, key: str, start: int = 0, length: int | None = None, if_match: str = "") -> bytes:
        """The object's bytes, or `length` of them from `start`; with `if_match` only of the object with that ETag."""
        ...

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        """Fill `into` (writable bytes) with the object's bytes from `start` on; fewer of them is `NotFound`."""
        ...

    def head(self, key: str) -> Entry:
        """Size and ETag of an object."""
        ...

    def list(self, prefix: str = "", delimiter: str = "", after: str = "") -> Iterator[Entry]:
        """Objects whose key begins with `prefix`, in the order of their keys, page by page as they are asked for.

        With `after` only those whose key comes after it. (A folder comes after every key that begins with its name.)
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        ...

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """What writers have begun under `prefix` and not ended, of whatever age."""
        ...

    def abandon(self, unfinished: Unfinished) -> None:
        """End it for good: what was sent is deleted, and its writer, if there is one, has to begin anew."""
        ...

    def probe(self) -> Probe:
        """Try everything that mend needs on an object of its own; raises the error that a run would meet later."""
        ...


def pieces(data: Data) -> tuple[memoryview, ...]:
    """The data as flat byte views."""
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    views = (memoryview(part) for part in parts)
    return tuple(view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views)


def size(views: Iterable[memoryview]) -> int:
    """Bytes of all views together."""
    return sum(view.nbytes for view in views)
