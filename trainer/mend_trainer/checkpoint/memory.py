"""Candidates in memory: which of a save's snapshots lie where, and the manifest that they add up to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from mend.environment import ENV_ARENAS
from mend.manifest import Chunk, Manifest
from mend.states import Holder
from mend.store import NotFound, StoreError
from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.checkpoint.commit import entries_of
from mend_trainer.checkpoint.gang import Gang
from mend_trainer.checkpoint.sources import Sheet, Source, data_name, sheet_key, sheet_of
from mend_trainer.checkpoint.writer import Written

_log = logging.getLogger(__name__)


class Others(Source, Protocol):
    """The memory of other workers, until it is closed."""

    def close(self) -> None:
        """Close all connections."""
        ...


Connect = Callable[[Sequence[Holder]], Others | None]  # None: the memory of others cannot be read here


class NotHad(Exception):
    """This candidate is not, or no longer, in the memory of the workers of this gang."""


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank contributes to what all know."""

    sheets: tuple[Sheet, ...] = ()


class Memory:
    """The memory of all workers, as one rank can read it, by `data_key`."""

    def __init__(self, arenas: Sequence[Arena], holders: Sequence[Holder], others: Source | None) -> None:
        self._arenas = arenas
        self._holders = holders
        self._others = others  # of whatever `holders` name
        self._own: dict[str, Snapshot] = {}  # by key

    @classmethod
    def of_this_worker(cls, own: Arena, holders: Sequence[Holder], others: Source | None) -> Memory:
        """With all arenas that the agent has named; with the rank's own where these cannot be opened."""
        try:
            arenas = [Arena.attach(path) for path in _paths()] or [own]
        except OSError as error:  # the agent is gone, or another user's
            _log.warning("the agent's shared memory cannot be opened (%s): nothing is restored from it", error)
            arenas = [own]
        return cls(arenas, holders, others)

    def manifest(self, gang: Gang, save_id: str) -> Manifest:
        """Find the snapshots of that save, with all ranks of the gang; raises `NotHad` on all of them alike."""
        own = self._look(save_id)
        shown = _Shown(sheets=tuple(own.values()) if os.environ.get("LOCAL_RANK", "0") == "0" else ())
        said = [msgspec.json.decode(each, type=_Shown) for each in gang.gather(msgspec.json.encode(shown))]
        sheets = {sheet.header.rank: sheet for each in said for sheet in each.sheets}
        if not sheets or len(sheets) < next(iter(sheets.values())).header.world_size:
            fetched = self._fetch(save_id, known=sheets.keys()) if gang.rank == 0 else _Shown()
            fetched = msgspec.json.decode(gang.hear_first(msgspec.json.encode(fetched)), type=_Shown)
            sheets |= {sheet.header.rank: sheet for sheet in fetched.sheets}
        return assembled(sheets)

    def view(self, key: str, start: int, length: int) -> memoryview | None:
        """Bytes of this worker's own memory, where they are; None if they are another's."""
        snapshot = self._own.get(key)
        return snapshot.data[start : start + length] if snapshot is not None else None

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        """As of a `Source`, from whoever has it."""
        snapshot = self._own.get(key)
        if snapshot is None:
            self._source_of_others(key).get_into(key, into, start)
            return
        try:
            snapshot.read_into(into, start)
        except (EOFError, OSError) as error:
            raise NotFound(key, f"{len(into)} bytes at byte {start} of this worker's memory: {error}") from error

    @property
    def is_unchanged(self) -> bool:
        """Whether what was read from this worker's memory was still there when it had been read."""
        return all(snapshot.is_whole for snapshot in self._own.values())

    def _look(self, save_id: str) -> dict[int, Sheet]:
        found: dict[int, Sheet] = {}
        self._own.clear()
        for arena in self._arenas:
            for snapshot in arena.snapshots():
                header = snapshot.header
                if header.save_id == save_id and header.rank not in found and (sheet := sheet_of(snapshot)):
                    found[header.rank] = sheet
                    self._own[f"{save_id}/{data_name(header.rank)}"] = snapshot
        return found

    def _fetch(self, save_id: str, known: Iterable[int]) -> _Shown:
        sheets = []
        wanted = {holder.rank for holder in self._holders if holder.save_id == save_id}
        for rank in sorted(wanted - set(known)):
            key = sheet_key(save_id, rank)
            try:
                sheets.append(msgspec.json.decode(self._source_of_others(key).get(key), type=Sheet))
            except (StoreError, msgspec.MsgspecError):
                continue  # the candidate is passed over
        return _Shown(sheets=tuple(sheets))

    def _source_of_others(self, key: str) -> Source:
        if self._others is None:
            raise NotFound(key, "this rank cannot read the memory of other workers")
        return self._others


def bytes_present(own: Arena) -> int:
    """What all arenas of this worker take of its memory now; the rank's own, where the others cannot be seen."""
    try:
        return sum(_bytes_of(path) for path in _paths()) or _bytes_of(own.descriptor)
    except OSError:
        return _bytes_of(own.descriptor)


def _bytes_of(place: str | int) -> int:
    return os.stat(place).st_blocks * 512  # noqa: PTH116 - or a descriptor


def _paths() -> list[str]:
    return [path for path in os.environ.get(ENV_ARENAS, "").split(",") if path]


def assembled(sheets: Mapping[int, Sheet]) -> Manifest:
    """The manifest of a save from the sheets of all its ranks; raises `NotHad` if they are not all there."""
    if 0 not in sheets:
        raise NotHad("the snapshot of rank 0 is in no worker's memory")
    first = sheets[0].header
    if missing := sorted(set(range(first.world_size)) - sheets.keys()):
        raise NotHad(f"snapshots of ranks {', '.join(map(str, missing[:8]))} are in no worker's memory")
    origin = first.origin
    for rank, sheet in sheets.items():
        other = sheet.header
        same = (other.save_id, other.world_size, other.origin.attempt, other.origin.step, other.origin.run_uid)
        if same != (first.save_id, first.world_size, origin.attempt, origin.step, origin.run_uid):
            raise NotHad(f"the snapshot of rank {rank} is of another save")
    try:
        tensors = entries_of([written for sheet in sheets.values() for written in _described(sheet)])
    except ValueError as error:
        raise NotHad(str(error)) from error
    return Manifest(
        run=origin.run,
        run_uid=origin.run_uid,
        step=origin.step,
        attempt=origin.attempt,
        lineage=origin.lineage,
        world_size=first.world_size,
        tokens=origin.tokens,
        created_unix_seconds=origin.created_unix_seconds,
        objects=(),
        tensors=tensors,
        values=origin.values,
        config_digest=origin.config_digest,
    )


def _described(sheet: Sheet) -> Iterable[Written]:
    header = sheet.header
    if len(sheet.digests) != len(header.blocks):
        raise NotHad(
            f"the snapshot of rank {header.rank} has {len(sheet.digests)} digests for {len(header.blocks)} blocks"
        )
    key = data_name(header.rank)
    for block, start, digest in zip(header.blocks, header.starts, sheet.digests, strict=True):
        yield Written(
            name=block.name,
            path=block.path,
            dtype=block.dtype,
            shape=block.shape,
            chunk=Chunk(
                offsets=block.offsets,
                sizes=block.sizes,
                key=key,
                start_byte=start,
                length_bytes=block.bytes,
                digest=digest,
            ),
            record_start=0,
            record_bytes=0,
        )
