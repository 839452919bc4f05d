"""The newest checkpoints are found among any number by what announces them, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests import a_manifest
from mend.catalog import Catalog, forgotten
from mend.keys import MANIFEST_NAME, QUARANTINE_NAME, announced_folder, announcement_key, checkpoint_key
from mend.listing import StoredCheckpoint, StoredSave
from mend.manifest import encode_manifest
from mend.ownership import Owner
from mend.restore import LEFTOVER_SECONDS
from mend.store import Unfinished
from mend.store.files import FileStore


def commit(store: FileStore, attempt: int, step: int, save_id: str = "a", *, announced: bool = True) -> str:
    """A checkpoint without tensors; its folder."""
    folder = checkpoint_key(step, attempt, save_id)
    manifest = a_manifest(step=step, attempt=attempt, tokens=step, created_unix_seconds=1000.0 + step, save_id=save_id)
    if announced:
        store.put(announcement_key(folder), b"")
    store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(manifest))
    return folder


def names(found: Iterable[StoredCheckpoint]) -> list[tuple[int, int]]:
    """Attempt and step of each."""
    return [(each.ref.attempt, each.ref.step) for each in found]


def by_age(found: Iterable[StoredCheckpoint]) -> list[StoredCheckpoint]:
    """The sound ones, oldest attempt and step first."""
    sound = [each for each in found if not each.quarantined]
    return sorted(sound, key=lambda each: (each.ref.attempt, each.ref.step))


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "run", 5.0)


@given(st.integers(0, 10**12 - 1), st.integers(0, 10**12 - 1), st.text("abcdef0123456789-", min_size=1))
def test_an_announcement_names_its_save(step: int, attempt: int, save_id: str) -> None:
    """The key of an announcement leads back to the folder that it announces."""
    folder = checkpoint_key(step, attempt, save_id)
    assert announced_folder(announcement_key(folder)) == folder


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 10**9)), unique=True))
def test_announcements_sort_by_attempt_then_step_the_newest_first(saves: list[tuple[int, int]]) -> None:
    """In the order of keys the last attempt's last step comes first."""
    keys = {announcement_key(checkpoint_key(step, attempt, "a")): (attempt, step) for attempt, step in saves}
    assert [keys[key] for key in sorted(keys)] == sorted(saves, reverse=True)


@pytest.mark.parametrize("key", ["newest/", "newest/x", "newest/000000000001-1-a", "step-000000000001/000001-a"])
def test_what_is_no_announcement_announces_nothing(key: str) -> None:
    """A key of another form is no announcement."""
    assert announced_folder(key) == ""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from(["committed", "announced", "quarantined"])),
        max_size=12,
        unique_by=lambda save: save[:2],
    ),
    st.integers(1, 6),
)
def test_the_newest_are_those_of_a_whole_listing(
    tmp_path_factory: pytest.TempPathFactory, saves: list[tuple[int, int, str]], wanted: int
) -> None:
    """Whatever was announced and came to nothing, the newest are the last ones of all, by attempt and step."""
    store = FileStore(tmp_path_factory.mktemp("run"), 5.0)
    for attempt, step, fate in saves:
        folder = checkpoint_key(step, attempt, "a")
        if fate == "announced":
            store.put(announcement_key(folder), b"")
            continue
        commit(store, attempt, step)
        if fate == "quarantined":
            store.put(f"{folder}/{QUARANTINE_NAME}", b"{}")
    everything = Catalog(store).checkpoints()
    sound = sorted(
        [each for each in everything if not each.quarantined], key=lambda each: (each.ref.attempt, each.ref.step)
    )

    def enough(found: Sequence[StoredCheckpoint]) -> bool:
        return sum(not each.quarantined for each in found) >= wanted

    found, partial = Catalog(store).newest(enough)
    assert by_age(found)[-wanted:] == sound[-wanted:]
    assert partial or found == everything


def test_finding_the_newest_costs_the_same_among_many(store: FileStore) -> None:
    """One sound checkpoint takes three listings, whether there are ten others or hundreds."""
    for step in range(1, 300):
        commit(store, 1, step)
    before = store.usage.requests.get("list", 0)
    found, partial = Catalog(store).newest(lambda found: bool(found))
    assert (names(found), partial) == ([(1, 299)], True)
    assert store.usage.requests["list"] - before == 3


def test_an_older_trainers_saves_are_found_beyond_the_announced(store: FileStore) -> None:
    """A checkpoint of a later step that nobody announced is found all the same, and comes first."""
    commit(store, 1, 5)
    commit(store, 2, 7, announced=False)
    found, _ = Catalog(store).newest(lambda found: bool(found))
    assert names(found) == [(2, 7)]


def test_where_nothing_is_announced_everything_is_listed(store: FileStore) -> None:
    """A prefix of before announcements is listed whole."""
    for step in (1, 2, 3):
        commit(store, 1, step, announced=False)
    found, partial = Catalog(store).newest(lambda found: bool(found))
    assert (names(found), partial) == ([(1, 1), (1, 2), (1, 3)], False)


def test_announcements_that_lie_are_passed_over(store: FileStore) -> None:
    """Announcements of saves that never were, and keys that are none, hide nothing."""
    commit(store, 3, 9)
    for number in range(40):
        store.put(announcement_key(checkpoint_key(100 + number, 900 + number, "never")), b"")
    store.put("newest/README", b"?")
    found, partial = Catalog(store).newest(lambda found: bool(found))
    assert (names(found), partial) == ([(3, 9)], True)


def test_a_mark_of_quarantine_is_seen_on_the_newest_too(store: FileStore) -> None:
    """A checkpoint that was listed sound and is marked since is listed as quarantined."""
    folder = commit(store, 1, 5)
    catalog = Catalog(store)
    assert not catalog.newest(lambda found: bool(found))[0][0].quarantined
    store.put(f"{folder}/{QUARANTINE_NAME}", b"{}")
    assert catalog.newest(lambda found: bool(found))[0][0].quarantined


def test_a_partial_view_says_so(store: FileStore) -> None:
    """A view that ends at what is enough tells that there may be more; one that saw everything does not."""
    for step in (1, 2, 3):
        commit(store, 1, step)
    owner = Owner(namespace="team", name="clio", uid="uid-1")
    part = Catalog(store).view(owner, lambda found: len(found) >= 1)
    whole = Catalog(store).view(owner, lambda found: len(found) >= 9)
    assert (part.partial, names(part.checkpoints)) == (True, [(1, 3)])
    assert (whole.partial, len(whole.checkpoints)) == (False, 3)


def test_pruning_takes_the_announcement_along(store: FileStore) -> None:
    """A pruned checkpoint is no longer announced."""
    first = commit(store, 1, 5)
    commit(store, 1, 6)
    Catalog(store).prune([f"{store.uri}/{first}"])
    assert [announced_folder(entry.key) for entry in store.list("newest/")] == [checkpoint_key(6, 1, "a")]


def a_save(attempt: int, step: int, modified_at: float, *, committed: bool) -> StoredSave:
    """A save as a listing shows it."""
    uri = f"s3://bucket/run/{checkpoint_key(step, attempt, 'a')}"
    return StoredSave(uri=uri, attempt=attempt, modified_at=modified_at, committed=committed)


def begun(key: str, at: float) -> Unfinished:
    """An upload begun then."""
    return Unfinished(key=key, begun_unix_seconds=at, id="id")


def test_only_what_nobody_will_end_is_forgotten() -> None:
    """Uploads are ended if they are old and of an attempt before, or of a committed save; those of others never."""
    now = 10 * LEFTOVER_SECONDS
    saves = [a_save(2, 8, now, committed=True), a_save(2, 7, 0.0, committed=True), a_save(2, 9, now, committed=False)]
    shard = "__0_0.distcp"
    gone = [
        begun(f"{checkpoint_key(3, 1, 'x')}/{shard}", 0.0),  # of an attempt before, without any object
        begun(f"{checkpoint_key(7, 2, 'a')}/{shard}", 0.0),  # of a save that was committed without it
    ]
    left = [
        begun(f"{checkpoint_key(9, 2, 'a')}/{shard}", 0.0),  # the present attempt may be at it
        begun(f"{checkpoint_key(3, 1, 'y')}/{shard}", now - 1.0),  # young
        begun("step-12/someone-elses.bin", 0.0),
        begun("data/train.bin", 0.0),
    ]
    assert forgotten(2, saves, [*gone, *left]) == gone
    assert forgotten(2, [], [*gone, *left]) == []  # without an object of its own the store's clock is not known


def test_any_number_of_saves_beyond_the_announced_ones_hides_none(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older trainer announced nothing, for more steps than a page holds: the newest of them comes first."""
    monkeypatch.setattr("mend.store.files.os.fsync", lambda descriptor: None)
    commit(store, 1, 5)
    for step in range(10, 1015):
        (store.root / checkpoint_key(step, 1, "a")).mkdir(parents=True)
    commit(store, 1, 1014, announced=False)
    found, _ = Catalog(store).newest(lambda found: bool(found))
    assert names(found) == [(1, 1014)]
