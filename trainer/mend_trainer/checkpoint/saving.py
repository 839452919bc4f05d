"""One owed snapshot on its way into a checkpoint: its object, its share, and the commit once all shares are there.

A share, once written, never changes, so everybody who sees the shares of all ranks comes to the same verdict: all are
good and the save may be committed, or one has an error and it never is. Whoever decides deletes the shares: at once the
saver of rank 0, the others if it does not. A share that has gone without leaving a manifest tells the rest that the
save was given up. Everything may be done twice: a saver that takes over from one that died starts from the beginning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from mend.keys import DCP_METADATA_NAME, MANIFEST_NAME, checkpoint_key, share_name
from mend.manifest import UnreadableManifest, decode_manifest, misplacement
from mend.reports import Committed, SaveFailed
from mend.states import CheckpointRef
from mend.store import AlreadyExists, NotFound, Store, StoreError
from mend.store.parallel import each
from mend_trainer.checkpoint.arena import Origin, Snapshot
from mend_trainer.checkpoint.commit import commit
from mend_trainer.checkpoint.signing import key_of
from mend_trainer.checkpoint.writer import (
    Share,
    UnreadableShare,
    decode_share,
    encode_share,
    what_changed,
    write_blocks,
)

_LOOK_SECONDS: Final = (0.05, 2.0)  # first and longest pause between two listings
_OTHERS_SECONDS: Final = 0.5  # the first pause of those who leave the commit to rank 0
_TAKE_OVER_SECONDS: Final = 3.0  # after all shares are there
_IN_TURN_SECONDS: Final = 0.05  # more for each rank: thousands would all read the shares of all
_READERS: Final = 4  # at most, of the shares of all: a few are read faster without threads
_AGAIN_SECONDS: Final = (1.0, 15.0)  # between two tries of a store that is away
_MOST_TOLD: Final = 8  # ranks: what came of a save has to fit into one message
_FAILURES: Final = (StoreError, OSError, RuntimeError, ValueError, MemoryError)

_log = logging.getLogger(__name__)
Outcome = Committed | SaveFailed
Result = TypeVar("Result")


class _GivenUp(Exception):
    """Nothing will come of this save, and why."""


class Saving:
    """The saving of one snapshot, in a thread of its own."""

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        digests: Sequence[str],
        *,
        unchanged: int,
        resumed: bool,
        complain: Callable[[SaveFailed], None],
        patience_seconds: float = 60.0,
        overtaken_seconds: float = 5.0,
    ) -> None:
        """`resumed`: another saver may have begun with it. `complain` is told of a store that is away meanwhile.

        `patience_seconds`: how long peers of which nothing new comes are waited for at least; `overtaken_seconds`, once
        ranks of a later attempt run here. Raises ValueError for a signing key that could be guessed.
        """
        header = snapshot.header
        self._store, self._snapshot, self._digests = store, snapshot, digests
        self._unchanged, self._resumed, self._complain = unchanged, resumed, complain
        self._patience_seconds, self._overtaken_seconds = patience_seconds, overtaken_seconds
        self._step, self._rank, self._world = header.origin.step, header.rank, header.world_size
        self._signing_key = key_of(header.origin.run)
        self._folder = checkpoint_key(header.origin.step, header.origin.attempt, header.save_id)
        self._began = time.monotonic()
        self._deadline = self._began + header.save_seconds
        self._upload_seconds = 0.0
        self._own: Share | None = None
        self._is_shared = False

    def run(self) -> Outcome:
        """Bring it to its end; never raises what a store or a snapshot can do to it."""
        try:
            listed = self._retried(self._list) if self._resumed else {}
            if MANIFEST_NAME in listed:
                self._retried(self._check_committed)
                return self._committed(_stored_bytes(listed))
            return self._committed(self._retried(lambda: self._share(listed)))
        except _GivenUp as given_up:
            return SaveFailed(step=self._step, error=str(given_up))

    def _share(self, listed: Mapping[str, int]) -> int:
        """Contribute this rank's share and see to the commit; the bytes of all ranks."""
        if not self._is_shared and share_name(self._rank) not in listed:
            self._contribute()
        if self._world > 1:
            return self._await_all()
        assert self._own is not None
        return self._conclude([self._own])

    # ------------------------------------------------------------ the own part
    def _contribute(self) -> None:
        """Upload, and put the share; tried again, the very same one: an answer may be lost after it was written."""
        if self._own is None:
            own = self._proven(self._upload())
            self._own = msgspec.structs.replace(own, origin=self._origin())
        if self._world > 1:
            place = self._key(share_name(self._rank))
            self._store.put(place, encode_share(self._own, place, self._signing_key))
        self._is_shared = True
        self._upload_seconds = time.monotonic() - self._began

    def _upload(self) -> Share:
        try:
            weights = sum(block.path[0] == "model" for block in self._snapshot.header.blocks)
            share = write_blocks(self._store, self._folder, self._snapshot, self._digests)
            return msgspec.structs.replace(share, weights=weights, unchanged=self._unchanged)
        except StoreError as error:
            if error.transient:
                raise
            return Share(error=f"{type(error).__name__}: {error}")
        except _FAILURES as error:
            return Share(error=f"{type(error).__name__}: {error}")

    def _proven(self, own: Share) -> Share:
        """The share, or why it does not count: after the last byte was sent, memory holds what was digested.

        Afterwards, so that nothing lies between the check and the sending: a bit that has flipped stays so.
        """
        problem = what_changed(self._snapshot, own)
        if not self._snapshot.is_whole:
            problem = "its snapshot was replaced while it was uploaded"
        elif problem:
            self._snapshot.condemn()
        return msgspec.structs.replace(own, written=(), error=problem) if problem else own

    def _origin(self) -> Origin:
        origin = self._snapshot.header.origin
        return origin if self._rank == 0 else msgspec.structs.replace(origin, values={})

    # ------------------------------------------------------------ the others
    def _await_all(self) -> int:
        names = {share_name(rank): rank for rank in range(self._world)}
        pause = _LOOK_SECONDS[0] if self._rank == 0 else _OTHERS_SECONDS
        take_over = _TAKE_OVER_SECONDS + _IN_TURN_SECONDS * self._rank
        seen: set[str] = set()
        news_at = complete_at = time.monotonic()
        while True:
            listed = self._list()
            if MANIFEST_NAME in listed:
                self._check_committed()
                return _stored_bytes(listed)
            if share_name(self._rank) not in listed and not self._is_there(MANIFEST_NAME):
                raise _GivenUp("another rank could not contribute its share; rank 0 tells which, and why")
            shares = {name for name in listed if name in names}
            now = time.monotonic()
            if shares - seen:
                seen |= shares
                news_at = complete_at = now
            is_complete = len(shares) == self._world
            if is_complete and (self._rank == 0 or now - complete_at > take_over):
                return self._decide()
            if not is_complete and now - news_at > (patience := self._patience):
                silent = sorted(names[name] for name in names.keys() - shares)
                raise _GivenUp(
                    f"nothing came of ranks {_some(silent)} within {patience:.0f}s; their savers may yet commit"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _LOOK_SECONDS[1])

    @property
    def _patience(self) -> float:
        """How long peers are waited for without news.

        Ranks that died while some of them copied leave a save of which nothing more will come; two such saves take both
        slots, and the next attempt could save nothing meanwhile. Its share stays: who comes last commits all the same.
        """
        is_overtaken = self._snapshot.arena.words.attempt > self._snapshot.header.origin.attempt
        least = self._overtaken_seconds if is_overtaken else self._patience_seconds
        return max(least, 2 * self._upload_seconds)

    def _decide(self) -> int:
        try:
            shares = each(self._read_share, range(self._world), min(_READERS, self._world // _READERS))
        except NotFound:  # another saver has just decided
            if self._is_there(MANIFEST_NAME):
                self._check_committed()
                return 0
            raise _GivenUp("another rank could not contribute its share") from None
        except UnreadableShare as error:
            raise _GivenUp(f"a share was damaged: {error}") from error
        stored_bytes = self._conclude(shares)
        self._delete_shares()
        return stored_bytes

    def _read_share(self, rank: int) -> Share:
        place = self._key(share_name(rank))
        return decode_share(self._store.get(place), place, self._signing_key)

    def _conclude(self, shares: Sequence[Share]) -> int:
        """Commit, or clean up and say why not; the bytes of all ranks."""
        failed = [f"rank {rank}: {share.error}" for rank, share in enumerate(shares) if share.error]
        why = "; ".join(failed[:_MOST_TOLD]) + (f"; and {len(failed) - _MOST_TOLD} more" * (len(failed) > _MOST_TOLD))
        if why := why or _stale(shares):
            self._clean_up(shares)
            raise _GivenUp(why)
        self._commit(shares)
        return sum(share.bytes for share in shares)

    def _commit(self, shares: Sequence[Share]) -> None:
        origin = shares[0].origin
        assert origin is not None
        try:
            commit(self._store, self._folder, origin, shares, self._signing_key)
        except AlreadyExists:  # by another saver, or by this one's predecessor
            self._check_committed()
            _log.info("the save at step %d was committed already", self._step)
        except NotFound as error:
            raise _GivenUp(str(error)) from error
        except ValueError as error:
            raise _GivenUp(f"{type(error).__name__}: {error}") from error

    def _check_committed(self) -> None:
        """A store that keeps half of what was cut off on its way refuses the whole ever after."""
        place = self._key(MANIFEST_NAME)
        try:
            found = decode_manifest(self._store.get(place))
        except UnreadableManifest as error:
            raise _GivenUp(f"{self._store.uri}/{place} is there already, and is no manifest: {error}") from error
        if problem := misplacement(found, self._folder):
            raise _GivenUp(f"{self._store.uri}/{place} is there already: {problem}")

    def _clean_up(self, shares: Sequence[Share]) -> None:
        """Nobody will ever commit it, and the disk may be full. The shares go last: they tell the others."""
        objects = [self._key(share.key) for share in shares if share.key]
        self._store.delete([*objects, self._key(DCP_METADATA_NAME)])
        if self._world > 1:
            self._delete_shares()

    def _delete_shares(self) -> None:
        self._store.delete([self._key(share_name(rank)) for rank in range(self._world)])

    # ------------------------------------------------------------ the store
    def _retried(self, work: Callable[[], Result]) -> Result:
        """`work`, again and again while the store is away, until the save's deadline; the first failure is told."""
        pause = _AGAIN_SECONDS[0]
        complained = False
        while True:
            try:
                return work()
            except StoreError as error:
                told = f"{type(error).__name__}: {error}"
                if not error.transient or time.monotonic() + pause > self._deadline:
                    raise _GivenUp(told) from error
                if not complained:
                    self._complain(SaveFailed(step=self._step, error=f"{told}; it is tried again"))
                    complained = True
            time.sleep(pause)
            pause = min(2 * pause, _AGAIN_SECONDS[1])

    def _list(self) -> dict[str, int]:
        start = len(self._folder) + 1
        return {entry.key[start:]: entry.bytes for entry in self._store.list(f"{self._folder}/")}

    def _is_there(self, name: str) -> bool:
        try:
            self._store.head(self._key(name))
        except NotFound:
            return False
        return True

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _committed(self, stored_bytes: int) -> Committed:
        header = self._snapshot.header
        uri = f"{self._store.uri}/{self._folder}"
        return Committed(
            checkpoint=CheckpointRef(uri=uri, step=self._step, attempt=header.origin.attempt),
            stall_seconds=header.stall_seconds,
            commit_seconds=max(0.0, time.time() - header.origin.created_unix_seconds),
            bytes=stored_bytes,
        )


def _stored_bytes(listed: Mapping[str, int]) -> int:
    """Of the objects of all ranks, where their shares are gone already."""
    return sum(size for name, size in listed.items() if name.endswith(".distcp"))


def _stale(shares: Sequence[Share]) -> str:
    """What is wrong if no weight of any rank has changed since the save before."""
    weights = sum(share.weights for share in shares)
    if not weights or any(share.unchanged < share.weights for share in shares):
        return ""
    return (
        f"all {weights} blocks of the model are as in the save before, although the run went on: what is saved does "
        "not follow what is trained. If the weights are meant to stand still (a learning rate of 0), give "
        "Session(weights_may_stand_still=True)"
    )


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:_MOST_TOLD]) + (", ..." if len(ranks) > _MOST_TOLD else "")
