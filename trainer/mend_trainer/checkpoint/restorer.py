"""Restores the best candidate that proves intact, the same on all ranks; the others are marked and left."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from mend.keys import MANIFEST_NAME, QUARANTINE_NAME
from mend.manifest import Manifest, NewerManifest, UnreadableManifest, Untrusted, decode_manifest, misplacement
from mend.protocol import Message
from mend.reports import Quarantined, Report
from mend.states import Ancestor, CheckpointRef
from mend.store import NotFound, Store, StoreError, of_reason
from mend_trainer.checkpoint.dcp import Corrupt
from mend_trainer.checkpoint.fit import compare, surplus_problem
from mend_trainer.checkpoint.gang import Gang
from mend_trainer.checkpoint.layout import leaves
from mend_trainer.checkpoint.memory import Memory, NotHad
from mend_trainer.checkpoint.outcome import CheckpointsUnreadable, MisfitError, RestoredState
from mend_trainer.checkpoint.reader import load

_log = logging.getLogger(__name__)


class _Failure(Message, frozen=True, kw_only=True):
    """A store that one rank could not read, told to the others."""

    reason: str
    where: str
    detail: str

    def error(self) -> StoreError:
        """The same error, to be raised on every rank."""
        return of_reason(self.reason)(self.where, self.detail)


class _Fetched(Message, frozen=True, kw_only=True):
    """What rank 0 got when it asked for the manifest."""

    manifest: bytes = b""
    missing: str = ""
    failure: _Failure | None = None


class _Loaded(Message, frozen=True, kw_only=True):
    """How loading went on one rank: at most one of these is set."""

    corrupt: str = ""
    failure: _Failure | None = None


class _FitFound(Message, frozen=True, kw_only=True):
    problems: tuple[str, ...]
    surplus: frozenset[str]


class _Rejected(Exception):
    """This candidate cannot be had; `mark` says whether it is to be marked, so that nobody tries it again.

    `begun`: the tensors of some rank may hold parts of it already.
    """

    def __init__(self, reason: str, *, mark: bool, begun: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.mark = mark
        self.begun = begun


def restore(
    gang: Gang,
    store: Store,
    memory: Memory,
    candidates: Sequence[CheckpointRef],
    state: Mapping[str, Any],
    report: Callable[[Report], None],
    mark: Callable[[], None],
    key: bytes | None = None,
) -> RestoredState | None:
    """As `Checkpointer.restore`, of at least one candidate."""
    tensors = {".".join(path): leaf for path, leaf in leaves(state)}
    rejections: list[str] = []
    has_begun = False
    for ref in candidates:
        try:
            if ref.save_in_memory:
                return _remember(gang, memory, ref, tensors, mark)
            return _restore_one(gang, store, ref, tensors, mark, key)
        except _Rejected as rejected:
            rejections.append(f"{ref.uri}: {rejected.reason}")
            has_begun |= rejected.begun
            if ref.save_in_memory:  # it was never more than a hope: who said so may have died since
                _log.warning("step %d is not restored from memory: %s", ref.step, rejected.reason)
                continue
            _log.error("checkpoint %s cannot be restored: %s", ref.uri, rejected.reason)
            if gang.rank == 0:
                if rejected.mark:
                    _mark(store, ref, rejected.reason)
                report(Quarantined(uri=ref.uri, reason=rejected.reason))
    if all(ref.save_in_memory for ref in candidates) and not has_begun:
        return None  # the run has no checkpoint yet, and the state is still the one to begin with
    raise CheckpointsUnreadable("no checkpoint can be restored: " + "; ".join(rejections))


def folder_of(store: Store, ref: CheckpointRef) -> str:
    """The key prefix of a checkpoint; raises ValueError if it lies elsewhere."""
    if not ref.uri.startswith(f"{store.uri}/"):
        raise ValueError(f"checkpoint {ref.uri} does not lie under the run's prefix {store.uri}")
    return ref.uri.removeprefix(f"{store.uri}/")


def _restore_one(
    gang: Gang,
    store: Store,
    ref: CheckpointRef,
    tensors: Mapping[str, torch.Tensor],
    mark: Callable[[], None],
    key: bytes | None,
) -> RestoredState:
    folder = folder_of(store, ref)
    manifest = _agreed_manifest(gang, store, folder, key)
    if elsewhere := misplacement(manifest, folder):
        raise _Rejected(elsewhere, mark=True)
    return _restore_from(gang, store, folder, manifest, ref, tensors, mark)


def _remember(
    gang: Gang, memory: Memory, ref: CheckpointRef, tensors: Mapping[str, torch.Tensor], mark: Callable[[], None]
) -> RestoredState:
    """As `_restore_one`, from the memory of workers."""
    try:
        manifest = memory.manifest(gang, ref.save_in_memory)
    except NotHad as missing:
        raise _Rejected(str(missing), mark=False) from missing
    return _restore_from(gang, memory, ref.save_in_memory, manifest, ref, tensors, mark)


def _restore_from(
    gang: Gang,
    source: Store | Memory,
    folder: str,
    manifest: Manifest,
    ref: CheckpointRef,
    tensors: Mapping[str, torch.Tensor],
    mark: Callable[[], None],
) -> RestoredState:
    if (manifest.step, manifest.attempt) != (ref.step, ref.attempt):
        found = f"step {manifest.step} of attempt {manifest.attempt}"
        raise _Rejected(f"its manifest is that of {found}, not of step {ref.step} of {ref.attempt}", mark=True)
    absent = _check_fit(gang, ref, manifest, tensors)
    present = {name: tensor for name, tensor in tensors.items() if name not in absent}
    _agree_on(gang, ref, _load(source, folder, manifest, present, mark))
    return RestoredState(
        ref=ref,
        step=manifest.step,
        tokens=manifest.tokens,
        world_size=manifest.world_size,
        lineage=(
            *manifest.lineage,
            Ancestor(attempt=manifest.attempt, step=manifest.step, uid=manifest.run_uid),
        ),
        values=manifest.values,
        absent=absent,
    )


def _agreed_manifest(gang: Gang, store: Store, folder: str, key: bytes | None) -> Manifest:
    """Read by rank 0 alone, so that all ranks work from the same bytes; each checks the signature itself."""
    fetched = _fetch(store, f"{folder}/{MANIFEST_NAME}") if gang.rank == 0 else _Fetched()
    fetched = msgspec.json.decode(gang.hear_first(msgspec.json.encode(fetched)), type=_Fetched)
    if fetched.failure:
        raise fetched.failure.error()
    if fetched.missing:
        raise _Rejected(f"it has no manifest: {fetched.missing}", mark=False)
    try:
        return decode_manifest(fetched.manifest, key)
    except (NewerManifest, Untrusted) as error:
        raise _Rejected(f"its manifest: {error}", mark=False) from error
    except UnreadableManifest as error:
        raise _Rejected(f"its manifest: {error}", mark=True) from error


def _fetch(store: Store, key: str) -> _Fetched:
    try:
        return _Fetched(manifest=store.get(key))
    except NotFound as error:
        return _Fetched(missing=str(error))
    except StoreError as error:
        return _Fetched(failure=_failure(error))


def _check_fit(
    gang: Gang, ref: CheckpointRef, manifest: Manifest, tensors: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    fit = compare(manifest, tensors)
    found = _FitFound(problems=fit.problems, surplus=fit.surplus)
    ranks = [msgspec.json.decode(said, type=_FitFound) for said in gang.gather(msgspec.json.encode(found))]
    problems = dict.fromkeys(problem for rank in ranks for problem in rank.problems)
    surplus = frozenset.intersection(*(rank.surplus for rank in ranks))
    if problems or surplus:
        raise MisfitError(ref.uri, (*problems, *(surplus_problem(manifest, name) for name in sorted(surplus))))
    return fit.absent


def _load(
    source: Store | Memory,
    folder: str,
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    mark: Callable[[], None],
) -> _Loaded:
    try:
        if not isinstance(source, Memory):
            load(source, folder, manifest, tensors, mark)
        else:
            load(source, folder, manifest, tensors, mark, source.view)
            if not source.is_unchanged:
                return _Loaded(corrupt="a snapshot was replaced while it was read")
    except Corrupt as error:
        return _Loaded(corrupt=str(error))
    except StoreError as error:
        return _Loaded(failure=_failure(error))
    return _Loaded()


def _agree_on(gang: Gang, ref: CheckpointRef, loaded: _Loaded) -> None:
    """Raise on all ranks what any of them met; a store that did not answer proves nothing about the checkpoint."""
    ranks = [msgspec.json.decode(said, type=_Loaded) for said in gang.gather(msgspec.json.encode(loaded))]
    for rank, found in enumerate(ranks):
        if found.corrupt:
            raise _Rejected(f"{found.corrupt} (found by rank {rank})", mark=True, begun=True)
    for found in ranks:
        if found.failure and ref.save_in_memory:
            raise _Rejected(str(found.failure.error()), mark=False, begun=True)
        if found.failure:
            raise found.failure.error()


def _failure(error: StoreError) -> _Failure:
    return _Failure(reason=error.reason, where=error.where, detail=error.detail)


def _mark(store: Store, ref: CheckpointRef, reason: str) -> None:
    note = msgspec.json.encode({"reason": reason, "uri": ref.uri, "step": ref.step, "attempt": ref.attempt})
    with contextlib.suppress(StoreError):  # the report tells the controller all the same
        store.put(f"{folder_of(store, ref)}/{QUARANTINE_NAME}", note)
