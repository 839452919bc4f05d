"""The background half of a save: digest, upload, agree, commit. A failure anywhere commits nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mend.protocol import Message
from mend.store import Store, StoreError
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.commit import Origin, commit
from mend_trainer.checkpoint.gang import Gang
from mend_trainer.checkpoint.writer import Share, digest_all, write_share

_FAILURES = (StoreError, OSError, RuntimeError, ValueError, MemoryError)


class SaveAborted(RuntimeError):
    """The save was not committed, and why."""


class _Verdict(Message, frozen=True, kw_only=True):
    """Rank 0's word: committed, unless there is an error."""

    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A save whose copy is complete."""

    folder: str  # key prefix of its own, never used before
    origin: Origin
    arena: Arena


def finish(gang: Gang, store: Store, begun: Begun) -> int:
    """Bring a save to its end on all ranks alike; the bytes that were stored. Raises `SaveAborted` if it failed."""
    try:
        shares = _share_with_all(gang, store, begun)
        failed = [f"rank {rank}: {share.error}" for rank, share in enumerate(shares) if share.error]
        if failed:
            _clean_up(store, begun.folder, shares[gang.rank])
            raise SaveAborted("; ".join(failed))
        verdict = _commit(store, begun, shares) if gang.rank == 0 else _Verdict()
        verdict = msgspec.json.decode(gang.hear_first(msgspec.json.encode(verdict)), type=_Verdict)
    except SaveAborted:
        raise
    except RuntimeError as error:  # the gang's: a peer is gone or silent
        raise SaveAborted(f"the ranks lost each other while saving: {error}") from error
    if verdict.error:
        raise SaveAborted(f"rank 0: {verdict.error}")
    return sum(share.bytes for share in shares)


def _share_with_all(gang: Gang, store: Store, begun: Begun) -> Sequence[Share]:
    own = Share(error="the upload broke off")  # what the peers hear if something unforeseen is raised below
    try:
        own = _upload(gang.rank, store, begun)
    finally:
        said = gang.gather(msgspec.json.encode(own))
    return [msgspec.json.decode(each, type=Share) for each in said]


def _upload(rank: int, store: Store, begun: Begun) -> Share:
    try:
        return write_share(store, begun.folder, rank, begun.arena, digest_all(begun.arena))
    except _FAILURES as error:
        return Share(error=f"{type(error).__name__}: {error}")


def _commit(store: Store, begun: Begun, shares: Sequence[Share]) -> _Verdict:
    try:
        commit(store, begun.folder, begun.origin, shares)
    except Exception as error:  # noqa: BLE001 - the peers wait for a verdict, whatever has gone wrong here
        return _Verdict(error=f"{type(error).__name__}: {error}")
    return _Verdict()


def _clean_up(store: Store, folder: str, own: Share) -> None:
    """Take back what this rank wrote: all ranks know that no manifest will ever name it, and the disk may be full."""
    if own.key:
        with contextlib.suppress(StoreError):
            store.delete([f"{folder}/{own.key}"])
