"""What lies under a prefix: whose it is, what is committed, what may go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from manifests import a_manifest
from mend.catalog import Catalog, NewerCheckpoint, PruneRefused
from mend.keys import (
    ANNOUNCEMENTS_FOLDER,
    DCP_METADATA_NAME,
    MANIFEST_NAME,
    OWNER_KEY,
    PINNED_NAME,
    QUARANTINE_NAME,
    VERIFIED_NAME,
    checkpoint_key,
)
from mend.manifest import MANIFEST_VERSION, StoredObject, encode_manifest
from mend.ownership import Owner, PrefixOwned, claim
from mend.states import Ancestor, CheckpointRef
from mend.store import Credentials, Entry, StoreError, open_store
from mend.store.files import FileStore

CLIO = Owner(namespace="team", name="clio", uid="uid-1")


class CountingStore(FileStore):
    """A folder that counts what is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 5.0)
        self.read: list[str] = []
        self.listed: list[str] = []

    def get(self, key: str, start: int = 0, length: int | None = None, if_match: str = "") -> bytes:
        self.read.append(key)
        return super().get(key, start, length, if_match)

    def list(self, prefix: str = "", delimiter: str = "", after: str = "") -> Iterator[Entry]:
        self.listed.append(prefix)
        return super().list(prefix, delimiter, after)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "run")


def a_checkpoint(store: FileStore, step: int, attempt: int = 1, save: str = "a", **changes: object) -> CheckpointRef:
    """Commit a checkpoint of one small shard."""
    folder = checkpoint_key(step, attempt, save)
    etag = store.put(f"{folder}/__0_0.distcp", b"shard")
    store.put(f"{folder}/{DCP_METADATA_NAME}", b"pickle")
    fields: dict[str, object] = {
        "step": step,
        "attempt": attempt,
        "lineage": (Ancestor(attempt=attempt - 1, step=1),) if attempt > 1 else (),
        "world_size": 2,
        "tokens": 10 * step,
        "created_unix_seconds": 1000.0 + step,
        "objects": (StoredObject(key="__0_0.distcp", bytes=5, etag=etag),),
    }
    store.put(f"{folder}/{MANIFEST_NAME}", encode_manifest(a_manifest(**(fields | changes))))
    return CheckpointRef(uri=f"{store.uri}/{folder}", step=step, attempt=attempt)


def test_only_what_has_a_manifest_is_committed(store: CountingStore) -> None:
    """Checkpoints are listed by step with what their manifests say; leftovers of unfinished saves are not."""
    newest, oldest = a_checkpoint(store, 20, 2), a_checkpoint(store, 5)
    store.put(f"{checkpoint_key(30, 2, 'torn')}/__0_0.distcp", b"half")
    first, second = Catalog(store).checkpoints()
    assert (first.ref, second.ref) == (oldest, newest)
    assert (second.lineage, second.world_size, second.tokens) == ((Ancestor(attempt=1, step=1),), 2, 200)
    assert second.committed_at == 1020.0
    assert not second.quarantined


def test_listing_again_reads_nothing_again(store: CountingStore) -> None:
    """A manifest is read once, and again only when its object has changed."""
    for step in range(1, 6):
        a_checkpoint(store, step)
    catalog = Catalog(store)
    seen = catalog.checkpoints()
    assert len(store.read) == 5
    assert catalog.checkpoints() == seen
    assert len(store.read) == 5
    a_checkpoint(store, 6)
    assert len(catalog.checkpoints()) == 6
    assert len(store.read) == 6


def test_marks_of_quarantine_are_seen(store: CountingStore) -> None:
    """A checkpoint that a rank has marked is listed as quarantined, also when it was listed sound before."""
    ref = a_checkpoint(store, 5)
    catalog = Catalog(store)
    assert not catalog.checkpoints()[0].quarantined
    store.put(f"{checkpoint_key(5, 1, 'a')}/{QUARANTINE_NAME}", b"{}")
    assert catalog.checkpoints()[0].quarantined
    assert catalog.checkpoints()[0].ref == ref


def test_a_damaged_manifest_counts_as_quarantined(store: CountingStore) -> None:
    """A manifest that is garbage, or that of another step, is never offered for a restore."""
    a_checkpoint(store, 5)
    store.put(f"{checkpoint_key(6, 1, 'a')}/{MANIFEST_NAME}", b"garbage")
    store.put(f"{checkpoint_key(7, 1, 'a')}/{MANIFEST_NAME}", store.get(f"{checkpoint_key(5, 1, 'a')}/{MANIFEST_NAME}"))
    assert [(each.ref.step, each.quarantined) for each in Catalog(store).checkpoints()] == [
        (5, False),
        (6, True),
        (7, True),
    ]


def test_checkpoints_of_a_newer_mend_stop_an_older_one(store: CountingStore) -> None:
    """An older controller does not pass over what a newer trainer saved and start from less: it says to upgrade."""
    a_checkpoint(store, 5)
    a_checkpoint(store, 6, version=MANIFEST_VERSION + 1)
    with pytest.raises(NewerCheckpoint, match="upgrade"):
        Catalog(store).checkpoints()
    view = Catalog(store).view(CLIO)
    assert (view.listed, view.problem_reason) == (False, "NewerCheckpoint")


def test_a_prefix_is_claimed_once_and_stays_claimed(store: CountingStore) -> None:
    """The first run owns the prefix; looking again changes nothing."""
    catalog = Catalog(store)
    assert catalog.view(CLIO).listed
    owner = store.get(OWNER_KEY)
    etag = store.head(OWNER_KEY).etag
    assert catalog.view(CLIO).listed
    assert (store.get(OWNER_KEY), store.head(OWNER_KEY).etag) == (owner, etag)


def test_a_second_run_is_refused_with_the_name_of_the_owner(store: CountingStore) -> None:
    """Another run on the same prefix is refused, and told who owns it and what to do."""
    claim(store, CLIO)
    view = Catalog(store).view(Owner(namespace="other", name="dora", uid="uid-2"))
    assert (view.listed, view.problem_reason) == (False, "PrefixOwned")
    assert "team/clio" in view.problem
    assert "prefix of its own" in view.problem
    assert msgspec.json.decode(store.get(OWNER_KEY), type=Owner) == CLIO


def test_a_run_made_anew_takes_its_prefix_over(store: CountingStore) -> None:
    """A run of the same name with another uid continues on its prefix."""
    claim(store, CLIO)
    again = msgspec.structs.replace(CLIO, uid="uid-2")
    assert Catalog(store).view(again).listed
    assert msgspec.json.decode(store.get(OWNER_KEY), type=Owner) == again


def test_a_prefix_that_holds_something_else_is_refused(store: CountingStore) -> None:
    """An owner object that mend did not write means that the prefix is not mend's."""
    store.put(OWNER_KEY, b"not json")
    with pytest.raises(PrefixOwned, match="something else"):
        claim(store, CLIO)
    assert store.get(OWNER_KEY) == b"not json"


def test_what_a_run_without_a_controller_wrote_is_no_stranger(store: CountingStore) -> None:
    """A prefix with saves, announcements, tokenizers and dossiers, and no owner, can still be claimed."""
    for key in ("step-000000000001/000001-a/x", "newest/a", "tokenizers/d-tokenizer.json", "incidents/a.json"):
        store.put(key, b"")
    claim(store, CLIO)
    assert msgspec.json.decode(store.get(OWNER_KEY), type=Owner) == CLIO


def test_problems_of_the_store_are_told_and_not_raised(tmp_path: Path) -> None:
    """A store that cannot be used shows in the view with its reason and remedy."""
    (tmp_path / "file").write_text("")
    view = Catalog(open_store(f"file://{tmp_path}/file/run", deadline_seconds=0.1)).view(CLIO)
    assert (view.listed, view.problem_reason) == (False, "WrongAnswer")
    assert "must be a folder" in view.problem


def test_pruning_deletes_exactly_what_is_named(store: CountingStore) -> None:
    """The named checkpoints are gone whole; others, leftovers and the owner stay."""
    refs = [a_checkpoint(store, step) for step in (1, 2, 3)]
    claim(store, CLIO)
    leftover = f"{checkpoint_key(1, 1, 'torn')}/__0_0.distcp"
    store.put(leftover, b"half")
    Catalog(store).prune([refs[0].uri, refs[1].uri])
    assert [entry.key for entry in store.list("")] == [
        OWNER_KEY,
        leftover,
        *(f"{checkpoint_key(3, 1, 'a')}/{name}" for name in (DCP_METADATA_NAME, "__0_0.distcp", MANIFEST_NAME)),
    ]
    Catalog(store).prune([refs[0].uri])  # once more changes nothing


def test_the_newest_sound_checkpoint_is_never_deleted(store: CountingStore) -> None:
    """A list that holds the newest checkpoint that is not quarantined is refused as a whole."""
    refs = [a_checkpoint(store, step) for step in (1, 2, 3)]
    store.put(f"{checkpoint_key(3, 1, 'a')}/{QUARANTINE_NAME}", b"{}")
    with pytest.raises(PruneRefused, match="newest"):
        Catalog(store).prune([refs[0].uri, refs[1].uri])
    assert len(Catalog(store).checkpoints()) == 3
    Catalog(store).prune([refs[2].uri])
    assert [each.ref for each in Catalog(store).checkpoints()] == refs[:2]


def test_what_was_pinned_meanwhile_is_spared(store: CountingStore) -> None:
    """Whoever decided may have listed before; the mark counts as it lies there now."""
    refs = [a_checkpoint(store, step) for step in (1, 2, 3)]
    store.put(f"{checkpoint_key(1, 1, 'a')}/{PINNED_NAME}", b"{}")
    assert Catalog(store).prune([refs[0].uri, refs[1].uri]) == (refs[0].uri,)
    assert [each.ref for each in Catalog(store).checkpoints()] == [refs[0], refs[2]]


def test_the_newest_verified_is_spared_also_if_it_was_verified_meanwhile(store: CountingStore) -> None:
    """Once a newer one is verified, it goes."""
    refs = [a_checkpoint(store, step) for step in (1, 2, 3)]
    store.put(f"{checkpoint_key(1, 1, 'a')}/{VERIFIED_NAME}", b"{}")
    assert Catalog(store).prune([refs[0].uri]) == (refs[0].uri,)
    store.put(f"{checkpoint_key(2, 1, 'a')}/{VERIFIED_NAME}", b"{}")
    assert Catalog(store).prune([refs[0].uri]) == ()
    assert [each.ref for each in Catalog(store).checkpoints()] == refs[1:]


def test_the_newest_verified_is_looked_for_once(store: CountingStore) -> None:
    """However many of those that go were verified; and not at all if none was."""
    refs = [a_checkpoint(store, step) for step in range(1, 8)]
    for step in (1, 2, 3, 4, 6):
        store.put(f"{checkpoint_key(step, 1, 'a')}/{VERIFIED_NAME}", b"{}")
    for going, looks in ((refs[:4], 2), (refs[4:5], 1)):
        store.listed.clear()
        assert Catalog(store).prune([each.uri for each in going]) == ()
        assert store.listed.count(f"{ANNOUNCEMENTS_FOLDER}/") == looks, "the first is for the newest of all"
    assert [each.ref for each in Catalog(store).checkpoints()] == refs[5:]


@pytest.mark.parametrize("uri", ["", "/step-000000000001", "/../other/step-000000000001/000001-a", "/owner.json"])
def test_what_is_no_checkpoint_is_not_deleted(store: CountingStore, uri: str) -> None:
    """An address that is not that of one checkpoint of this prefix is refused."""
    a_checkpoint(store, 1)
    a_checkpoint(store, 2)
    with pytest.raises(PruneRefused, match="no checkpoint under"):
        Catalog(store).prune([store.uri + uri])
    assert len(Catalog(store).checkpoints()) == 2


def test_a_prune_that_is_cut_leaves_no_committed_half(store: CountingStore) -> None:
    """If deleting stops in the middle, what is left does not count as a checkpoint."""
    refs = [a_checkpoint(store, step) for step in (1, 2)]
    deleted = store.delete
    calls: list[list[str]] = []

    def cut_after_the_first(keys: list[str]) -> None:
        calls.append(list(keys))
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        deleted(keys)

    store.delete = cut_after_the_first  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="Input/output"):
        Catalog(store).prune([refs[0].uri])
    assert [each.ref for each in Catalog(store).checkpoints()] == [refs[1]]


def test_a_listing_asks_once_per_step(store: CountingStore) -> None:
    """The cost of a listing grows with the checkpoints kept, not with the ranks that wrote them."""
    for step in range(1, 5):
        a_checkpoint(store, step)
        for rank in range(1, 20):
            store.put(f"{checkpoint_key(step, 1, 'a')}/__{rank}_0.distcp", b"")
    Catalog(store).checkpoints()
    assert len(store.listed) == 5


def test_a_caution_is_part_of_every_view(store: CountingStore) -> None:
    """What the store was found not to do when it was opened is told with each listing."""
    assert Catalog(store, caution="it forgets").view(CLIO).caution == "it forgets"
    assert Catalog(store).view(CLIO).caution == ""


@pytest.mark.parametrize(
    ("endpoint", "region"), [("http://", None), ("http://[::1", None), ("http://ho st", None), (None, "no region")]
)
def test_an_endpoint_or_region_that_is_none_is_named(endpoint: str | None, region: str | None) -> None:
    """The error names the value, the field and what is expected there, and can be shown like any of the store's."""
    keys = Credentials(access_key_id="a", secret_access_key="b", region=region)
    with pytest.raises(StoreError) as caught:
        open_store("s3://bucket/run", endpoint, keys, deadline_seconds=0.2).probe()
    assert caught.value.reason in ("BadAddress", "Unreachable")
    assert "spec.checkpoint.endpoint" in str(caught.value)
    assert repr(endpoint or region)[1:-1] in str(caught.value)
