"""Where the bytes of a candidate come from: the store, this worker's memory, or another worker's."""

from __future__ import annotations

from typing import Protocol

from mend.protocol import Message
from mend_trainer.checkpoint.arena import Header, Snapshot


class Source(Protocol):
    """Objects by key. Every method may raise a `mend.store.StoreError`; of these `NotFound` says that it is not there.

    A `mend.store.Store` is one. The memory of a worker is another: its keys are `sheet_key` and `data_key`.
    """

    def get(self, key: str) -> bytes:
        """The whole object."""
        ...

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        """Fill `into` (writable bytes) with the object's bytes from `start` on; fewer of them is `NotFound`."""
        ...


class Sheet(Message, frozen=True, kw_only=True):
    """What has to be known of a snapshot to restore from its bytes."""

    header: Header
    digests: tuple[str, ...]


def sheet_key(save_id: str, rank: int) -> str:
    """Of a `Sheet` as JSON."""
    return f"{save_id}/{rank:06d}.sheet"


def data_key(save_id: str, rank: int) -> str:
    """Of a snapshot's `data`: its blocks, each at its start."""
    return f"{save_id}/{data_name(rank)}"


def data_name(rank: int) -> str:
    """The last part of the `data_key`."""
    return f"{rank:06d}.data"


def sheet_of(snapshot: Snapshot) -> Sheet | None:
    """None while its digests are not taken yet, or if it was found damaged or has been replaced."""
    digests = snapshot.digests if snapshot.is_held else None
    return Sheet(header=snapshot.header, digests=digests) if digests is not None else None
