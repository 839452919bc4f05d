"""Savers that meet in the store: from whatever each of them sees, all come to the same verdict, and it is right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from mend.environment import ENV_SIGNING_KEY
from mend.keys import MANIFEST_NAME, share_name
from mend.manifest import decode_manifest, encode_manifest
from mend.reports import Committed, SaveFailed
from mend.store import Data, Unreachable
from mend.store.files import FileStore
from mend.verify import verify
from mend_trainer.checkpoint.arena import Arena, Header, Origin, Snapshot
from mend_trainer.checkpoint.layout import blocks_of, local_tensors
from mend_trainer.checkpoint.saver import Saver
from mend_trainer.checkpoint.saving import Outcome, Saving
from mend_trainer.checkpoint.writer import Share, UnreadableShare, decode_share, digest_all, encode_share
from mend_trainer.savers import Came, Holding, Said
from waiting import wait_until

WORLD = 2


class Died(BaseException):
    """A saver that is gone: nothing of it runs any more."""


class Watched(FileStore):
    """A folder that calls `before` at each request, with what is asked and of which object."""

    def __init__(self, root: Path, before: Callable[[str, str], None] = lambda what, key: None) -> None:
        super().__init__(root, 5.0)
        self._before = before

    def put(self, key: str, data: Data) -> str:
        """As the real one."""
        self._before("put", key)
        return super().put(key, data)

    def get(self, key: str, start: int = 0, length: int | None = None, if_match: str = "") -> bytes:
        """As the real one."""
        self._before("get", key)
        return super().get(key, start, length, if_match)


def a_snapshot(rank: int, world: int = WORLD, step: int = 7, arena: Arena | None = None) -> Snapshot:
    """What that rank has copied at this step: its own tensor."""
    state = {"model": {f"w{rank}": torch.full((50,), float(rank))}}
    arena = arena or Arena.create(f"rank-{rank}")
    draft = arena.begin(blocks_of(state))
    assert draft is not None
    draft.fill(local_tensors(state))
    origin = Origin(
        run="team/clio",
        run_uid="u",
        attempt=1,
        lineage=(),
        config_digest="",
        step=step,
        tokens=70,
        values={"of": rank},
        created_unix_seconds=123.0,
    )
    header = Header(
        save_id="a" * 16,
        origin=origin,
        rank=rank,
        world_size=world,
        blocks=draft.blocks,
        uri="file:///x",
        save_seconds=5.0,
    )
    return draft.publish(header, owed=True)


def a_saving(
    store: FileStore,
    snapshot: Snapshot,
    *,
    resumed: bool = False,
    patience_seconds: float = 30.0,
    overtaken_seconds: float = 30.0,
    unchanged: int = 0,
) -> Saving:
    """One saver's work on it."""
    return Saving(
        store,
        snapshot,
        digest_all(snapshot),
        unchanged=unchanged,
        resumed=resumed,
        complain=lambda failed: None,
        patience_seconds=patience_seconds,
        overtaken_seconds=overtaken_seconds,
    )


def together(*savings: Saving) -> list[Outcome]:
    """What all of them come to, at the same time."""
    outcomes: dict[int, Outcome] = {}

    def run(number: int) -> None:
        outcomes[number] = savings[number].run()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(savings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[number] for number in range(len(savings))]


def names(store: FileStore) -> list[str]:
    """What lies in the folder of the save."""
    return [entry.key.rpartition("/")[2] for entry in store.list("step-")]


def folder_of(store: FileStore) -> str:
    """Of the only save in it."""
    (folder,) = {entry.key.rpartition("/")[0] for entry in store.list("step-")}
    return folder


def dies_at(what: str, part: str) -> Callable[[str, str], None]:
    """End the saver when it asks for that."""

    def before(asked: str, key: str) -> None:
        if asked == what and part in key:
            raise Died

    return before


def test_all_commit_once_and_the_shares_are_gone(tmp_path: Path) -> None:
    """Two savers, one checkpoint: both say so, it has the values of rank 0, and no share is left."""
    store = Watched(tmp_path)
    outcomes = together(*(a_saving(store, a_snapshot(rank)) for rank in range(WORLD)))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]
    assert names(store) == [".metadata", "__0_0.distcp", "__1_0.distcp", MANIFEST_NAME]
    manifest = decode_manifest(store.get(next(e.key for e in store.list("step-") if e.key.endswith(MANIFEST_NAME))))
    assert (manifest.values, manifest.world_size, sorted(manifest.tensors)) == ({"of": 0}, 2, ["model.w0", "model.w1"])


@pytest.mark.parametrize("resumed", [False, True])
def test_half_a_manifest_is_no_commit(tmp_path: Path, resumed: bool) -> None:
    """A store that keeps what was cut off on its way, and refuses the whole ever after, has committed nothing."""
    whole = Watched(tmp_path / "whole")
    together(*(a_saving(whole, a_snapshot(rank)) for rank in range(WORLD)))
    place = next(entry.key for entry in whole.list("step-") if entry.key.endswith(MANIFEST_NAME))
    store = Watched(tmp_path / "half")
    store.put(place, whole.get(place)[:-20])
    outcomes = together(*(a_saving(store, a_snapshot(rank), resumed=resumed) for rank in range(WORLD)))
    assert all(isinstance(outcome, SaveFailed) for outcome in outcomes), outcomes
    assert all("is no manifest" in outcome.error for outcome in outcomes if isinstance(outcome, SaveFailed))


def test_a_manifest_of_another_save_is_no_commit(tmp_path: Path) -> None:
    """Whatever put it there: it does not describe what this save has uploaded."""
    other = Watched(tmp_path / "other")
    together(*(a_saving(other, a_snapshot(rank)) for rank in range(WORLD)))
    place = next(entry.key for entry in other.list("step-") if entry.key.endswith(MANIFEST_NAME))
    moved = replace(decode_manifest(other.get(place)), step=3)
    store = Watched(tmp_path / "here")
    store.put(place, encode_manifest(moved))
    outcomes = together(*(a_saving(store, a_snapshot(rank)) for rank in range(WORLD)))
    assert all(isinstance(outcome, SaveFailed) for outcome in outcomes), outcomes
    assert all("is that of step 3" in outcome.error for outcome in outcomes if isinstance(outcome, SaveFailed))


@pytest.mark.parametrize(
    ("what", "part"), [("put", ".distcp"), ("put", "share-"), ("get", "share-"), ("put", ".metadata")]
)
def test_a_saver_of_rank_0_that_dies_is_done_without_or_followed(what: str, part: str, tmp_path: Path) -> None:
    """Wherever the saver of rank 0 dies, the save is committed, by its successor or by the saver of rank 1."""
    snapshots = [a_snapshot(rank) for rank in range(WORLD)]
    store = Watched(tmp_path)
    late = a_saving(store, snapshots[1])
    if what == "get" or part == ".metadata":  # it comes so far only once the other share is there
        late._contribute()
    with pytest.raises(Died):
        a_saving(Watched(tmp_path, dies_at(what, part)), snapshots[0]).run()
    outcomes = together(a_saving(store, snapshots[0], resumed=True), a_saving(store, snapshots[1], resumed=True))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]
    assert [name for name in names(store) if name.startswith("share-")] == []


def test_without_rank_0_the_others_commit(tmp_path: Path) -> None:
    """Rank 0's share is there and its saver is not: the saver of rank 1 commits after a while."""
    store = Watched(tmp_path)
    a_saving(store, a_snapshot(0))._contribute()
    assert isinstance(a_saving(store, a_snapshot(1)).run(), Committed)
    assert MANIFEST_NAME in names(store)


@pytest.mark.parametrize("early", [0, 1])
def test_who_comes_after_a_peer_has_given_up_finds_its_share(early: int, tmp_path: Path) -> None:
    """As where a worker flushed a newer step first: the share of whoever waited in vain lies there, and it commits."""
    store = Watched(tmp_path)
    waited = a_saving(store, a_snapshot(early), patience_seconds=0.2).run()
    assert isinstance(waited, SaveFailed)
    assert isinstance(a_saving(store, a_snapshot(1 - early)).run(), Committed)
    assert MANIFEST_NAME in names(store)


def test_what_is_committed_already_is_not_done_again(tmp_path: Path) -> None:
    """A saver that finds the manifest writes nothing more."""
    snapshot = a_snapshot(0, world=1)
    assert isinstance(a_saving(Watched(tmp_path), snapshot).run(), Committed)
    asked: list[str] = []
    again = a_saving(Watched(tmp_path, lambda what, key: asked.append(what)), snapshot, resumed=True).run()
    assert isinstance(again, Committed)
    assert asked == ["get"], "of the manifest"


def test_two_savers_of_one_rank_do_no_harm(tmp_path: Path) -> None:
    """One that was thought dead goes on beside its successor: one checkpoint, and both know of it."""
    store, snapshot = Watched(tmp_path), a_snapshot(0, world=1)
    outcomes = together(a_saving(store, snapshot), a_saving(store, snapshot, resumed=True))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]
    assert names(store) == [".metadata", "__0_0.distcp", MANIFEST_NAME]


def fails_to_write(what: str, key: str) -> None:
    """A disk that breaks under the object."""
    if what == "put" and key.endswith(".distcp"):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("failing", range(WORLD))
def test_one_error_fails_all_and_leaves_nothing(failing: int, tmp_path: Path) -> None:
    """When one rank cannot write, no saver takes the save for committed, and the folder is empty again."""
    stores = [Watched(tmp_path, fails_to_write) if rank == failing else Watched(tmp_path) for rank in range(WORLD)]
    outcomes = together(*(a_saving(stores[rank], a_snapshot(rank)) for rank in range(WORLD)))
    assert [type(outcome) for outcome in outcomes] == [SaveFailed, SaveFailed]
    assert isinstance(outcomes[0], SaveFailed)
    assert f"rank {failing}: OSError" in outcomes[0].error
    assert names(stores[0]) == []


def flip(snapshot: Snapshot) -> None:
    """One bit of its first block, as bad memory does it."""
    snapshot.raw(0)[17] ^= 4


class Flips(Watched):
    """A folder beside which one bit of a snapshot flips: `before` an object of that name is written, or after."""

    def __init__(self, root: Path, snapshot: Snapshot, part: str, *, before: bool) -> None:
        super().__init__(root)
        self._snapshot, self._part, self._flips_before = snapshot, part, before

    def put(self, key: str, data: Data) -> str:
        """As the real one, and the bit."""
        is_it = self._part in key
        if is_it and self._flips_before:
            flip(self._snapshot)
        etag = super().put(key, data)
        if is_it and not self._flips_before:
            flip(self._snapshot)
        return etag


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("damaged", range(WORLD))
def test_what_was_not_digested_is_never_committed(damaged: int, before: bool, tmp_path: Path) -> None:
    """A bit that flips in memory after its digest, before or while its bytes are sent, fails the save of all ranks."""
    snapshots = [a_snapshot(rank) for rank in range(WORLD)]
    stores = [
        Flips(tmp_path, each, ".distcp", before=before) if each.header.rank == damaged else Watched(tmp_path)
        for each in snapshots
    ]
    for each in snapshots:
        each.add_digests(digest_all(each))
    outcomes = together(*(a_saving(store, each) for store, each in zip(stores, snapshots, strict=True)))
    assert [type(outcome) for outcome in outcomes] == [SaveFailed, SaveFailed]
    assert isinstance(outcomes[0], SaveFailed)
    for told in (f"rank {damaged}: model.w{damaged} at [0] (bytes", f"of __{damaged}_0.distcp)", "ECC"):
        assert told in outcomes[0].error
    assert names(stores[0]) == [], "nor does it leave anything behind"
    assert [each.is_held for each in snapshots] == [rank != damaged for rank in range(WORLD)]


def test_a_bit_that_flips_once_what_was_sent_is_proven_changes_nothing(tmp_path: Path) -> None:
    """The proof comes between the last byte and the share: afterwards the checkpoint needs no memory any more."""
    snapshots = [a_snapshot(rank) for rank in range(WORLD)]
    store = Flips(tmp_path, snapshots[1], share_name(1), before=True)
    outcomes = together(a_saving(Watched(tmp_path), snapshots[0]), a_saving(store, snapshots[1]))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]
    assert not verify(store, folder_of(store)).is_damaged


def test_a_saver_that_dies_having_found_damage_is_followed_by_one_that_finds_it_too(tmp_path: Path) -> None:
    """The word that a snapshot is damaged does not leave it owed for ever."""
    snapshot = a_snapshot(0, world=1)
    snapshot.add_digests(digest_all(snapshot))
    first, digests = a_saving(Watched(tmp_path, dies_at("put", ".distcp")), snapshot), snapshot.digests
    with pytest.raises(Died):
        first.run()
    flip(snapshot)
    snapshot.condemn()
    assert digests == snapshot.digests
    said: list[Said] = []
    saver = Saver([snapshot.arena], said.append, lambda uri, endpoint: Watched(tmp_path))
    saver.look()
    wait_until(lambda: not snapshot.is_owed, "settled")
    saver.look()
    (failed,) = [each.outcome for each in said if isinstance(each, Came)]
    assert isinstance(failed, SaveFailed)
    assert [each.held for each in said if isinstance(each, Holding)] == [(), ()], "nobody is offered it"


class Deaf(Watched):
    """A folder whose answer to the first share is lost after it was written."""

    def __init__(self, root: Path, before: Callable[[str, str], None]) -> None:
        super().__init__(root, before)
        self._shares = 0
        self.is_answered = threading.Event()

    def put(self, key: str, data: Data) -> str:
        """As the real one, but for the answer."""
        etag = super().put(key, data)
        if "share-" in key:
            self._shares += 1
            if self._shares == 1:
                raise Unreachable(key, "the connection was closed", transient=True)
            self.is_answered.set()
        return etag


def test_a_share_whose_answer_was_lost_is_put_again_as_it_was(tmp_path: Path) -> None:
    """Others may have read it: a second try does not upload anew, and so come to another share."""
    uploads: list[str] = []

    def breaks_later(what: str, key: str) -> None:
        if what == "put" and key.endswith(".distcp"):
            uploads.append(key)
            if len(uploads) > 1:
                fails_to_write(what, key)

    deaf = Deaf(tmp_path, breaks_later)

    def after_that(what: str, key: str) -> None:
        deaf.is_answered.wait(60.0)

    outcomes = together(a_saving(Watched(tmp_path, after_that), a_snapshot(0)), a_saving(deaf, a_snapshot(1)))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]


def test_errors_of_many_ranks_fit_into_one_message(tmp_path: Path) -> None:
    """Of a large world only the first are told, and how many more there are."""
    store, saving = Watched(tmp_path), a_saving(Watched(tmp_path), a_snapshot(0, world=20))
    key = f"{saving._folder}/{share_name(0)}"
    for rank in range(1, 20):
        store.put(key.replace(share_name(0), share_name(rank)), encode_share(Share(error="no space left")))
    outcome = saving.run()
    assert isinstance(outcome, SaveFailed)
    assert outcome.error.count("no space left") == 8
    assert outcome.error.endswith("; and 11 more")


def test_a_peer_that_never_comes_is_not_waited_for_without_end(tmp_path: Path) -> None:
    """The wait ends with the ranks that are missing; object and share stay, and who comes last commits."""
    store = Watched(tmp_path)
    outcome = a_saving(store, a_snapshot(0), patience_seconds=0.2).run()
    assert isinstance(outcome, SaveFailed)
    assert "nothing came of ranks 1" in outcome.error
    assert names(store) == ["__0_0.distcp", share_name(0)]
    assert isinstance(a_saving(store, a_snapshot(1)).run(), Committed)


@pytest.mark.timeout(60)  # far less than the patience for peers whose attempt goes on
def test_peers_of_an_attempt_that_is_over_are_not_waited_for_as_long(tmp_path: Path) -> None:
    """Once ranks of the next attempt run here, half saves give their slots back soon, though they fill both of them."""
    store, arena = Watched(tmp_path), Arena.create("rank-0")
    snapshots = [a_snapshot(0, arena=arena), a_snapshot(0, arena=arena, step=9)]
    arena.words.attempt = 2
    for snapshot in snapshots:
        outcome = a_saving(store, snapshot, patience_seconds=3600.0, overtaken_seconds=0.1).run()
        assert isinstance(outcome, SaveFailed)
    assert isinstance(a_saving(store, a_snapshot(1)).run(), Committed)


def test_a_damaged_share_commits_nothing(tmp_path: Path) -> None:
    """A share with a flipped bit is noticed by who would commit: what it says would become the manifest."""
    store = Watched(tmp_path)
    a_saving(store, a_snapshot(1))._contribute()
    (path,) = tmp_path.glob(f"step-*/*/{share_name(1)}")
    raw = bytearray(path.read_bytes())
    raw[60] ^= 1
    path.write_bytes(raw)
    outcome = a_saving(store, a_snapshot(0)).run()
    assert isinstance(outcome, SaveFailed)
    assert "a share was damaged" in outcome.error
    assert MANIFEST_NAME not in names(store)


@pytest.mark.parametrize("forged", ["unsigned", "of another rank", "with another key"])
def test_with_a_signing_key_a_share_of_a_stranger_commits_nothing(
    forged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may only write to the bucket cannot have digests of bytes of their own signed with the manifest."""
    monkeypatch.setenv(ENV_SIGNING_KEY, "f" * 64)
    store = Watched(tmp_path)
    late = a_saving(store, a_snapshot(1))
    late._contribute()
    place = f"{late._folder}/{share_name(1)}"
    share = decode_share(store.get(place), place, late._signing_key)
    key = None if forged == "unsigned" else b"guessed" if forged == "with another key" else late._signing_key
    signed_for = place.replace(share_name(1), share_name(0)) if forged == "of another rank" else place
    store.put(place, encode_share(share, signed_for, key))
    outcome = a_saving(store, a_snapshot(0)).run()
    assert isinstance(outcome, SaveFailed)
    assert "the signature by this run's key" in outcome.error
    assert MANIFEST_NAME not in names(store)


def test_signed_shares_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All savers of a run have its key, and read what the others have signed."""
    monkeypatch.setenv(ENV_SIGNING_KEY, "f" * 64)
    outcomes = together(*(a_saving(Watched(tmp_path), a_snapshot(rank)) for rank in range(WORLD)))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]


def test_weights_that_stand_still_on_one_rank_only_are_saved(tmp_path: Path) -> None:
    """One rank may hold nothing but frozen layers; if no rank's weights have changed, the save is refused."""
    store = Watched(tmp_path / "one")
    outcomes = together(a_saving(store, a_snapshot(0), unchanged=1), a_saving(store, a_snapshot(1)))
    assert [type(outcome) for outcome in outcomes] == [Committed, Committed]
    store = Watched(tmp_path / "all")
    outcomes = together(*(a_saving(store, a_snapshot(rank), unchanged=1) for rank in range(WORLD)))
    assert [type(outcome) for outcome in outcomes] == [SaveFailed, SaveFailed]
    assert isinstance(outcomes[0], SaveFailed)
    assert "weights_may_stand_still" in outcomes[0].error
    assert names(store) == []


def test_a_share_comes_back_as_it_was_written() -> None:
    """A share is read only with the digest that it begins with."""
    raw = encode_share(Share(key="k", bytes=5, weights=2))
    assert decode_share(raw) == Share(key="k", bytes=5, weights=2)
    with pytest.raises(UnreadableShare):
        decode_share(raw[:-1])
