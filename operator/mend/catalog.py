"""What lies under a run's prefix in the store: what is committed, what is kept, and what may go."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import ClassVar, Final

import msgspec

from mend.keys import (
    ANNOUNCEMENTS_FOLDER,
    INCIDENTS_FOLDER,
    MANIFEST_NAME,
    PINNED_NAME,
    QUARANTINE_NAME,
    VERIFIED_NAME,
    announced_folder,
    announcement_key,
    parse_folder,
    split_key,
)
from mend.listing import StoredCheckpoint, StoredSave, StoreView
from mend.manifest import NewerManifest, UnreadableManifest, Untrusted, decode_manifest, misplacement
from mend.ownership import Owner, claim
from mend.restore import LEFTOVER_SECONDS, swept
from mend.states import CheckpointRef
from mend.store import AlreadyExists, Entry, Forbidden, NotFound, Store, StoreError, Unfinished, WrongAnswer
from mend.store.parallel import each

Enough = Callable[[Sequence[StoredCheckpoint]], bool]

KEPT_DOSSIERS: Final = 100
_PAGE: Final = 1000  # keys that a store lists at once
_LOOKED_AT: Final = 16  # saves looked into at once, at the most
_BEFORE_MANIFEST: Final = "l"  # in a save's folder, what a listing of it need not show: the ranks' objects
# In place of a manifest; told from one by its length, which no manifest has.
SWEPT: Final = b"mend: this save was swept away, for nobody had committed it\n"
_DOSSIER: Final = re.compile(rf"{INCIDENTS_FOLDER}/\d{{6,}}-\d{{6,}}-[^/]*\.json")


class PruneRefused(StoreError):
    """Deleting this would lose the newest committed checkpoint, or something that is no checkpoint."""

    reason: ClassVar[str] = "PruneRefused"


class NewerCheckpoint(StoreError):
    """A newer mend wrote here. To pass over its checkpoints would be to start again from an older one, or from none."""

    reason: ClassVar[str] = "NewerCheckpoint"
    remedy: ClassVar[str] = "upgrade mend's controller to the version of the trainer's image"


class NotSigned(StoreError):
    """There are checkpoints, none of them signed by this run: to pass over them all would be to start from nothing."""

    reason: ClassVar[str] = "NotSigned"
    remedy: ClassVar[str] = (
        "if they are this run's: `mend checkpoint sign`, or a spec without signingSecret; if the key was changed, put "
        "the old one back"
    )


class Catalog:
    """A run's prefix. Synchronous: the controller asks from a thread. Manifests are read once and remembered.

    With a `key`, only checkpoints whose manifests are signed with it count; the others are passed over.
    """

    def __init__(self, store: Store, caution: str = "", key: bytes | None = None) -> None:
        self._store = store
        self._caution = caution  # shown in every view
        self._key = key
        self._doubted: dict[str, str] = {}  # by uri: why
        self._known: dict[tuple[str, str], StoredCheckpoint] = {}

    def view(self, owner: Owner, enough: Enough | None = None) -> StoreView:
        """Claim the prefix for its owner and list it; what goes wrong with the store is told in the view.

        With `enough` the view may be partial: it ends where that says so, beginning with the newest.
        """
        try:
            claim(self._store, owner)
            found, partial = self.newest(enough) if enough else (self.checkpoints(), False)
            return StoreView(
                listed=True,
                checkpoints=found,
                partial=partial,
                caution=self._caution,
                passed_over=self.passed_over,
            )
        except StoreError as error:
            return StoreView(problem=str(error), problem_reason=error.reason)

    def newest(self, enough: Enough) -> tuple[tuple[StoredCheckpoint, ...], bool]:
        """Committed checkpoints by step, the newest of them until `enough` says so; and whether there may be more.

        However many there are, that takes a page of announcements, a page of what may lie beyond them (saved by a
        trainer that announced nothing), and a short listing of each save looked into. Where `enough` is never said,
        or nothing is announced, everything is listed.
        """
        announced = self._announced()
        first = list(islice(announced, _PAGE))
        folders = _once(self._beyond(first), first, announced) if first else iter(())
        found: list[StoredCheckpoint] = []
        at_once = 1
        while batch := list(islice(folders, at_once)):
            looked = each(self._look_into, batch, _LOOKED_AT // 2)
            found += [checkpoint for checkpoint in looked if checkpoint is not None]
            if enough(found):
                return _in_order(found), True
            at_once = min(2 * at_once, _LOOKED_AT)
        return self.checkpoints(), False

    def checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        """All committed checkpoints by step; one request for a thousand folders and one per step."""
        doubted: dict[str, str] = {}  # its own: retention may list at the same time, in another thread
        found: list[StoredCheckpoint] = []
        read: dict[tuple[str, str], StoredCheckpoint] = {}
        for folder in self._store.list("step-", delimiter="/"):
            for save, entries in _by_save(self._store.list(folder.key)).items():
                manifest = entries.get(MANIFEST_NAME)
                known = self._read(save, manifest, doubted) if manifest else None
                if manifest and known:
                    read[manifest.key, manifest.etag] = known
                    found.append(_marked(known, entries))
        self._known, self._doubted = read, doubted
        if doubted and all(each.quarantined for each in found):
            raise NotSigned(self._store.uri, _in_words(doubted))
        return _in_order(found)

    def prune(self, uris: Sequence[str]) -> tuple[str, ...]:
        """Delete these checkpoints and nothing else: the manifest first, so that a half-deleted one does not count.

        Spares, and returns, what is worth more than whoever decided knew: what was pinned since the last listing, and
        what was verified since, unless a newer one is. Raises `PruneRefused`, before anything is deleted, if the newest
        sound checkpoint is among them.
        """
        folders = [self._folder(uri) for uri in uris]
        sound = [each for each in self.newest(_shows_a_sound_one)[0] if not each.quarantined]
        for newest in sound[-1:]:
            if newest.ref.uri in uris:
                raise PruneRefused(newest.ref.uri, "is the newest committed checkpoint")
        spared: list[str] = []
        newest_verified = cache(self._newest_verified)  # spared in any case, so it stays what it is
        for folder in folders:
            keys = [entry.key for entry in self._store.list(f"{folder}/")]
            if _is_worth_more(folder, keys, newest_verified):
                spared.append(f"{self._store.uri}/{folder}")
                continue
            self._store.delete([key for key in keys if key == f"{folder}/{MANIFEST_NAME}"])
            self._store.delete(sorted(keys, key=lambda key: key.endswith(f"/{QUARANTINE_NAME}")))
            self._store.delete([announcement_key(folder)])  # last: what is not announced would not be found again
        return tuple(spared)

    def _newest_verified(self) -> str:
        """Its folder; "" if there is none."""
        verified = [each for each in self.newest(_shows_a_verified_one)[0] if each.verified and not each.quarantined]
        return verified[-1].ref.uri.removeprefix(f"{self._store.uri}/") if verified else ""

    def sweep(self, attempt: int) -> tuple[str, ...]:
        """Delete what `restore.swept` says of all that lies here, as of `attempt`; which saves it was.

        A save that nobody committed is fenced first, by a manifest that is none: then its saver, should it still be
        alive after all, finds that it came too late, as it would if another saver had won.
        """
        saves = self.saves()
        self.end_uploads(attempt, saves)
        gone: list[str] = []
        for save in swept(attempt, saves):
            folder = self._folder(save.uri)
            if self._is_other_by_now(folder, save):
                continue
            if not save.committed:
                try:
                    self._store.put_if_absent(f"{folder}/{MANIFEST_NAME}", SWEPT)
                except AlreadyExists:
                    continue  # it was committed after all
            keys = [entry.key for entry in self._store.list(f"{folder}/")]
            self._store.delete([key for key in keys if not key.endswith((f"/{MANIFEST_NAME}", f"/{QUARANTINE_NAME}"))])
            self._store.delete([f"{folder}/{QUARANTINE_NAME}", f"{folder}/{MANIFEST_NAME}"])
            self._store.delete([announcement_key(folder)])
            gone.append(save.uri)
        return tuple(gone)

    def end_uploads(self, attempt: int, saves: Sequence[StoredSave], old_seconds: float = LEFTOVER_SECONDS) -> None:
        """End the uploads that nobody will resume, as of `attempt`, where the store lets one see them."""
        with contextlib.suppress(Forbidden, WrongAnswer):
            for upload in forgotten(attempt, saves, self._store.unfinished("step-"), old_seconds):
                self._store.abandon(upload)

    def saves(self) -> tuple[StoredSave, ...]:
        """All saves, committed or not: lists every object, so it is asked a few times a day at the most."""
        saves = _by_save(self._store.list("step-"))
        return tuple(_save(self._store.uri, folder, entries) for folder, entries in sorted(saves.items()))

    def _is_other_by_now(self, folder: str, save: StoredSave) -> bool:
        """Whether it was committed, pinned or deleted since everything was listed, which may take minutes."""
        entries = _by_save(self._store.list(f"{folder}/")).get(folder)
        now = _save(self._store.uri, folder, entries) if entries else None
        return now is None or (now.committed, now.pinned) != (save.committed, save.pinned)

    @property
    def passed_over(self) -> str:
        """Which checkpoints the key does not vouch for, in words; "" if there are none."""
        return _in_words(dict(self._doubted))

    def keep_dossier(self, key: str, raw: bytes) -> None:
        """Write an incident's dossier, unless it is there, and delete all but the newest `KEPT_DOSSIERS`."""
        if not _DOSSIER.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a dossier")
        with contextlib.suppress(AlreadyExists):  # written by this action the time before, or by another leader
            self._store.put_if_absent(key, raw)
        found = [each for each in self._store.list(f"{INCIDENTS_FOLDER}/") if _DOSSIER.fullmatch(each.key)]
        found.sort(key=lambda each: (each.modified_unix_seconds, each.key))
        self._store.delete([each.key for each in found[:-KEPT_DOSSIERS]])

    def _announced(self) -> Iterator[str]:
        """The folders of announced saves, newest first, page by page. What they announce may be gone, or a lie."""
        return filter(None, (announced_folder(entry.key) for entry in self._store.list(f"{ANNOUNCEMENTS_FOLDER}/")))

    def _beyond(self, announced: Iterable[str]) -> Iterator[str]:
        """Saves of steps beyond all of these, the highest first."""
        last = max(folder.partition("/")[0] for folder in announced)
        steps = self._store.list("step-", delimiter="/", after=f"{last}/~")
        for step in sorted((step.key for step in steps if step.key > f"{last}/"), reverse=True):
            yield from sorted(_by_save(self._store.list(step)), reverse=True)

    def _look_into(self, save: str) -> StoredCheckpoint | None:
        """The checkpoint in a folder; None if it is not committed, or passed over."""
        entries = _by_save(self._store.list(f"{save}/", after=f"{save}/{_BEFORE_MANIFEST}")).get(save, {})
        manifest = entries.get(MANIFEST_NAME)
        known = self._read(save, manifest, self._doubted) if manifest else None
        if manifest is None or known is None:
            return None
        self._known[manifest.key, manifest.etag] = known
        self._doubted.pop(known.ref.uri, None)  # it has been signed since
        return _marked(known, entries)

    def _read(self, save: str, entry: Entry, doubted: dict[str, str]) -> StoredCheckpoint | None:
        """The checkpoint of a manifest; a damaged one counts as quarantined, one that was just deleted as none."""
        if known := self._known.get((entry.key, entry.etag)):
            return known
        try:
            return _described(self._store.uri, save, self._store.get(entry.key, 0, entry.bytes), self._key)
        except NotFound:
            return None
        except Untrusted as error:
            doubted[f"{self._store.uri}/{save}"] = str(error)
            return None

    def _folder(self, uri: str) -> str:
        folder = uri.removeprefix(f"{self._store.uri}/")
        if split_key(f"{folder}/{MANIFEST_NAME}") is None:
            raise PruneRefused(uri, f"is no checkpoint under {self._store.uri}")
        return folder


def forgotten(
    attempt: int, saves: Sequence[StoredSave], unfinished: Iterable[Unfinished], old_seconds: float = LEFTOVER_SECONDS
) -> list[Unfinished]:
    """Of what is unfinished, what nobody will end: long begun, in a save that is committed or of an earlier attempt.

    As in `restore.swept` its age is told by how much newer the newest object is. What does not look like an object of
    a save of mend's is somebody else's.
    """
    newest = max((save.modified_at for save in saves), default=0.0)
    committed = {save.uri[save.uri.rindex("/step-") + 1 :] for save in saves if save.committed}
    return [
        each
        for each in unfinished
        if (place := split_key(each.key))
        and newest - each.begun_unix_seconds >= old_seconds
        and (parse_folder(place[0]).attempt < attempt or place[0] in committed)
    ]


def _in_words(doubted: Mapping[str, str]) -> str:
    first = next(iter(doubted.items()), None)
    return f"{len(doubted)} checkpoints are passed over; the first, {first[0]}: {first[1]}" if first else ""


def _is_worth_more(folder: str, keys: Sequence[str], newest_verified: Callable[[], str]) -> bool:
    """Whether what lies in this folder may not go, whatever was decided: it is pinned, or the newest verified one."""
    if f"{folder}/{PINNED_NAME}" in keys:
        return True
    is_verified = f"{folder}/{VERIFIED_NAME}" in keys and f"{folder}/{QUARANTINE_NAME}" not in keys
    return is_verified and newest_verified() in ("", folder)


def _shows_a_sound_one(found: Sequence[StoredCheckpoint]) -> bool:
    return any(not each.quarantined for each in found)


def _shows_a_verified_one(found: Sequence[StoredCheckpoint]) -> bool:
    return any(each.verified and not each.quarantined for each in found)


def _in_order(checkpoints: Iterable[StoredCheckpoint]) -> tuple[StoredCheckpoint, ...]:
    return tuple(sorted(checkpoints, key=lambda each: (each.ref.step, each.ref.attempt, each.ref.uri)))


def _once(*parts: Iterable[str]) -> Iterator[str]:
    """All of them in their order, none twice."""
    seen: set[str] = set()
    for part in parts:
        for folder in part:
            if folder not in seen:
                seen.add(folder)
                yield folder


def _by_save(entries: Iterable[Entry]) -> dict[str, dict[str, Entry]]:
    saves: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if place := split_key(entry.key):
            folder, name = place
            saves.setdefault(folder, {})[name] = entry
    return saves


def _save(uri: str, folder: str, entries: dict[str, Entry]) -> StoredSave:
    quarantined = entries.get(QUARANTINE_NAME)
    return StoredSave(
        uri=f"{uri}/{folder}",
        attempt=parse_folder(folder).attempt,
        modified_at=max(entry.modified_unix_seconds for entry in entries.values()),
        committed=MANIFEST_NAME in entries and entries[MANIFEST_NAME].bytes != len(SWEPT),
        quarantined_at=quarantined.modified_unix_seconds if quarantined else None,
        pinned=PINNED_NAME in entries,
    )


def _marked(known: StoredCheckpoint, entries: dict[str, Entry]) -> StoredCheckpoint:
    """The checkpoint with the marks that lie beside its manifest."""
    return msgspec.structs.replace(
        known,
        quarantined=known.quarantined or QUARANTINE_NAME in entries,
        verified=VERIFIED_NAME in entries,
        pinned=PINNED_NAME in entries,
    )


def _described(uri: str, save: str, raw: bytes, key: bytes | None) -> StoredCheckpoint:
    named = parse_folder(save)
    ref = CheckpointRef(uri=f"{uri}/{save}", step=named.step, attempt=named.attempt)
    try:
        manifest = decode_manifest(raw, key)
    except Untrusted:
        raise
    except NewerManifest as error:
        raise NewerCheckpoint(ref.uri, str(error)) from error
    except UnreadableManifest:
        return StoredCheckpoint(ref=ref, quarantined=True)
    return StoredCheckpoint(
        ref=ref,
        run_uid=manifest.run_uid,
        lineage=manifest.lineage,
        world_size=manifest.world_size,
        tokens=manifest.tokens,
        committed_at=manifest.created_unix_seconds,
        bytes=sum(each.bytes for each in manifest.objects),
        quarantined=bool(misplacement(manifest, save)),
    )
