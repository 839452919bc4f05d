"""What nobody committed is swept away once it is old and of an attempt that is over, and never a save in flight."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from manifests import a_manifest
from mend.catalog import SWEPT, Catalog
from mend.keys import MANIFEST_NAME, PINNED_NAME, QUARANTINE_NAME, share_name
from mend.listing import StoredSave
from mend.manifest import encode_manifest
from mend.restore import LEFTOVER_SECONDS, QUARANTINE_SECONDS, swept
from mend.store import AlreadyExists, Store, open_store
from mend.store.files import FileStore
from s3 import ministack
from stored_checkpoint import save

NOW = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    found = open_store(f"file://{tmp_path}/run")
    assert isinstance(found, FileStore)
    return found


def aged(store: FileStore, folder: str, seconds: float) -> str:
    """Everything in the folder was written so long before the newest object."""
    for entry in store.list(f"{folder}/"):
        os.utime(store.root / entry.key, (NOW - seconds, NOW - seconds))
    return folder


def left(store: Store) -> set[str]:
    """The folders in which something lies."""
    return {entry.key.rpartition("/")[0] for entry in store.list("step-")}


def test_leftovers_of_attempts_that_are_over_go_when_they_are_old(store: FileStore) -> None:
    """Objects and shares of a dead save; what is committed, young, or of the present attempt stays."""
    committed = aged(store, save(store, 9, attempt=2), 0)
    old = save(store, 4, attempt=1, committed=False)
    store.put(f"{old}/{share_name(0)}", b"a share of a dead save")
    aged(store, old, LEFTOVER_SECONDS + 1)
    young = aged(store, save(store, 5, attempt=1, committed=False), LEFTOVER_SECONDS - 1)
    present = aged(store, save(store, 6, attempt=2, committed=False), 10 * LEFTOVER_SECONDS)
    old_and_committed = aged(store, save(store, 3, attempt=1), 10 * LEFTOVER_SECONDS)
    assert Catalog(store).sweep(attempt=2) == (f"{store.uri}/{old}",)
    assert left(store) == {committed, young, present, old_and_committed}
    assert Catalog(store).sweep(attempt=2) == ()


def test_the_age_is_told_by_the_stores_own_clock(store: FileStore) -> None:
    """If nothing newer is written, nothing is old, whatever the time is: clocks of controller and store may differ."""
    alone = aged(store, save(store, 4, attempt=1, committed=False), 10 * LEFTOVER_SECONDS)
    assert Catalog(store).sweep(attempt=5) == ()
    assert left(store) == {alone}


def test_a_save_that_is_being_written_is_young_whatever_lies_beside_it(store: FileStore) -> None:
    """Its newest object counts, so the first of many hours of uploading does not."""
    aged(store, save(store, 9, attempt=2), 0)
    slow = aged(store, save(store, 4, attempt=1, committed=False), 10 * LEFTOVER_SECONDS)
    late = f"{slow}/__7_0.distcp"
    store.put(late, b"the last upload")
    os.utime(store.root / late, (NOW - 5, NOW - 5))
    assert Catalog(store).sweep(attempt=2) == ()


def test_a_saver_that_comes_too_late_finds_its_save_fenced(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the fence and the deletion its commit fails; without the fence it would commit what is being deleted."""
    aged(store, save(store, 9, attempt=2), 0)
    old = aged(store, save(store, 4, attempt=1, committed=False), LEFTOVER_SECONDS + 1)
    refused: list[Exception] = []
    delete = store.delete

    def late_commit(keys: list[str]) -> None:
        if not refused:
            with pytest.raises(AlreadyExists) as caught:
                store.put_if_absent(f"{old}/{MANIFEST_NAME}", b"a manifest")
            refused.append(caught.value)
        delete(keys)

    monkeypatch.setattr(store, "delete", late_commit)
    assert Catalog(store).sweep(attempt=2) == (f"{store.uri}/{old}",)
    assert refused
    assert old not in left(store)


def test_a_save_that_is_committed_at_the_last_moment_stays(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the fence."""
    aged(store, save(store, 9, attempt=2), 0)
    old = aged(store, save(store, 4, attempt=1, committed=False), LEFTOVER_SECONDS + 1)
    catalog = Catalog(store)
    listed = catalog.saves()
    save(store, 4, attempt=1)
    monkeypatch.setattr(catalog, "saves", lambda: listed)
    assert catalog.sweep(attempt=2) == ()
    assert f"{store.uri}/{old}" in [each.ref.uri for each in catalog.checkpoints()]


def test_where_conditions_are_ignored_a_commit_since_the_listing_is_seen_all_the_same(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence would be written over the manifest there; and what was pinned meanwhile stays, too."""
    aged(store, save(store, 9, attempt=2), 0)
    old = aged(store, save(store, 4, attempt=1, committed=False), LEFTOVER_SECONDS + 1)
    left_over = aged(store, save(store, 5, attempt=1, committed=False), LEFTOVER_SECONDS + 1)
    catalog = Catalog(store)
    listed = catalog.saves()
    save(store, 4, attempt=1)
    store.put(f"{left_over}/{PINNED_NAME}", b"{}")
    monkeypatch.setattr(catalog, "saves", lambda: listed)
    monkeypatch.setattr(store, "put_if_absent", store.put)
    assert catalog.sweep(attempt=2) == ()
    assert {old, left_over} <= left(store)
    assert f"{store.uri}/{old}" in [each.ref.uri for each in catalog.checkpoints() if not each.quarantined]


def test_a_sweep_that_was_cut_is_ended_by_the_next(store: FileStore) -> None:
    """What it has fenced is no checkpoint, and is swept again."""
    aged(store, save(store, 9, attempt=2), 0)
    old = save(store, 4, attempt=1, committed=False)
    store.put(f"{old}/{MANIFEST_NAME}", SWEPT)
    aged(store, old, LEFTOVER_SECONDS + 1)
    assert [each.quarantined for each in Catalog(store).checkpoints()] == [True, False]
    assert Catalog(store).sweep(attempt=2) == (f"{store.uri}/{old}",)
    assert old not in left(store)


def test_no_manifest_is_as_short_as_a_fence() -> None:
    """By that they are told apart in a listing."""
    least = a_manifest(run="", run_uid="", step=0, attempt=0, created_unix_seconds=0)
    assert len(encode_manifest(least)) > len(SWEPT)


def test_what_was_quarantined_stays_for_a_week(store: FileStore) -> None:
    """Somebody may want to know what happened to it; pinned, it stays for good."""
    aged(store, save(store, 9), 0)
    fresh, stale, pinned = (save(store, step) for step in (4, 5, 6))
    for folder, seconds in ((fresh, QUARANTINE_SECONDS - 1), (stale, QUARANTINE_SECONDS), (pinned, QUARANTINE_SECONDS)):
        store.put(f"{folder}/{QUARANTINE_NAME}", b"{}")
        aged(store, folder, seconds)
    store.put(f"{pinned}/{PINNED_NAME}", b"{}")
    assert Catalog(store).sweep(attempt=1) == (f"{store.uri}/{stale}",)


def test_it_works_in_a_bucket(tmp_path: Path) -> None:
    """Listing, fencing and deleting against a real S3 server."""
    with ministack(tmp_path) as server:
        store = open_store(server.uri("swept"), server.endpoint, server.credentials)
        newest = save(store, 9, attempt=2)
        old = save(store, 4, attempt=1, committed=False)
        catalog = Catalog(store)
        listed = [
            msgspec.structs.replace(
                each, modified_at=each.modified_at - (0 if each.committed else LEFTOVER_SECONDS + 60)
            )
            for each in catalog.saves()
        ]
        assert [each.uri for each in swept(2, listed)] == [f"{store.uri}/{old}"]
        catalog.saves = lambda: tuple(listed)  # type: ignore[method-assign]  # a server's clock cannot be set
        assert catalog.sweep(attempt=2) == (f"{store.uri}/{old}",)
        assert left(store) == {newest}


def test_a_save_of_nobody_knows_when_is_left() -> None:
    """The rule itself: of an attempt that is over, and older than the newest by an hour."""
    one = StoredSave(uri="a", attempt=1, modified_at=0.0)
    newest = StoredSave(uri="b", attempt=2, modified_at=LEFTOVER_SECONDS, committed=True)
    assert swept(2, [one, newest]) == (one,)
    assert swept(1, [one, newest]) == ()
    assert swept(2, [msgspec.structs.replace(one, pinned=True), newest]) == ()
