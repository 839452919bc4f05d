"""What the saver writes can be proven to the last byte, is signed if there is a key, and is read back on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_ranks import train
from gang_of_ranks import run_ranks
from mend.environment import ENV_SIGNING_KEY
from mend.keys import MANIFEST_NAME, QUARANTINE_NAME, VERIFIED_NAME
from mend.manifest import Untrusted, decode_manifest, signing_key
from mend.orders import CheckpointPlan
from mend.reports import Committed, Quarantined, Report, SaveFailed, Staged
from mend.states import CheckpointRef
from mend.store import Data, Store, open_store
from mend.store.api import pieces
from mend.store.files import FileStore
from mend.verify import verify
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.links import SaverLink
from mend_trainer.checkpoint.outcome import CheckpointsUnreadable
from mend_trainer.checkpoint.saver import Saver
from mend_trainer.savers import Came, Said
from saver_thread import with_store

SECRET = "a secret of the tests, long enough"
KEY = signing_key(SECRET.encode(), "team/clio")


class Nobody:
    """A saver that never looks."""

    tells_agent = False

    def wake(self, staged: Staged) -> None:
        """It does not hear."""

    def revive(self) -> None:
        """It never lived."""

    def close(self) -> None:
        """It does not mind."""


class Keeper:
    """A rank alone, with a weight, and a saver in a thread."""

    def __init__(
        self,
        store: Store,
        *,
        run: str = "team/clio",
        attempt: int = 1,
        verify: bool = False,
        saver: Callable[[Arena], SaverLink] | None = None,
    ) -> None:
        self.store = store
        self.reports: list[Report] = []
        self.arena = Arena.create("rank-0")
        self.checkpointer = Checkpointer(
            CheckpointPlan(uri=store.uri, verify=verify),
            run=run,
            run_uid="uid-1",
            attempt=attempt,
            report=self.reports.append,
            store=store,
            arena=self.arena,
            saver=saver or with_store(store),
        )

    def save(self, step: int) -> CheckpointRef:
        """A checkpoint whose weight is its step."""
        assert self.checkpointer.save(step, step, {"model": {"w": torch.full((64,), float(step))}}, {})
        assert self.checkpointer.wait(60), self.reports
        return next(each.checkpoint for each in reversed(self.reports) if isinstance(each, Committed))

    def restore(self, *refs: CheckpointRef) -> float:
        """The weight that comes of it."""
        weight = torch.zeros(64)
        self.checkpointer.restore(refs, {"model": {"w": weight}})
        return float(weight[0])


def a_store(folder: Path) -> FileStore:
    """An empty prefix."""
    found = open_store(f"file://{folder}/run")
    assert isinstance(found, FileStore)
    return found


def folder_of(store: Store, ref: CheckpointRef) -> str:
    """Relative to the prefix."""
    return ref.uri.removeprefix(f"{store.uri}/")


def test_every_byte_of_what_ranks_save_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with real tensors of several types: nothing in their objects is without a digest, and it is signed."""
    monkeypatch.setenv(ENV_SIGNING_KEY, SECRET)
    store = a_store(tmp_path)
    (ref,) = run_ranks(2, tmp_path / "a", train, "fsdp", store.uri, 1, 1, 2, {2}, [])[0]["refs"]
    folder = folder_of(store, ref)
    found = verify(store, folder, KEY)
    assert found.is_sound, found.problems
    assert [each.unproven_bytes for each in found.objects] == [0, 0]
    assert found.bytes == sum(entry.bytes for entry in store.list(f"{folder}/__"))
    key = f"{folder}/__1_0.distcp"
    whole = store.get(key)
    for position in range(0, len(whole), 211):
        store.put(key, whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        assert verify(store, folder, KEY).is_damaged, position


def test_a_signed_run_restores_what_it_signed_and_passes_over_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unsigned checkpoint and another run's are left unmarked, and the one before is taken."""
    store = a_store(tmp_path)
    unsigned = Keeper(store, attempt=3).save(30)
    monkeypatch.setenv(ENV_SIGNING_KEY, SECRET)
    good = Keeper(store).save(10)
    foreign = Keeper(store, run="team/dora", attempt=2).save(20)
    keeper = Keeper(store, attempt=4)
    assert keeper.restore(unsigned, foreign, good) == 10.0
    assert [each.uri for each in keeper.reports if isinstance(each, Quarantined)] == [unsigned.uri, foreign.uri]
    assert [entry.key for entry in store.list("step-") if entry.key.endswith(QUARANTINE_NAME)] == []
    with pytest.raises(CheckpointsUnreadable, match="not signed"):
        Keeper(store, attempt=5).restore(unsigned)


def test_a_manifest_moved_to_another_save_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rightly signed, of the same run, and not of this place: marked, and the one before is taken."""
    monkeypatch.setenv(ENV_SIGNING_KEY, SECRET)
    store = a_store(tmp_path)
    keeper = Keeper(store)
    first, second = keeper.save(10), keeper.save(20)
    store.put(f"{folder_of(store, second)}/{MANIFEST_NAME}", store.get(f"{folder_of(store, first)}/{MANIFEST_NAME}"))
    assert Keeper(store, attempt=2).restore(second, first) == 10.0
    assert store.head(f"{folder_of(store, second)}/{QUARANTINE_NAME}").bytes


def test_a_key_that_could_be_guessed_fails_the_save_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is committed with a signature that is worth nothing."""
    monkeypatch.setenv(ENV_SIGNING_KEY, "short")
    keeper = Keeper(a_store(tmp_path))
    assert keeper.checkpointer.save(1, 1, {"model": {"w": torch.zeros(4)}}, {})
    assert not keeper.checkpointer.wait(60)
    (failed,) = [each for each in keeper.reports if isinstance(each, SaveFailed)]
    assert "expected 16 at least" in failed.error


def test_without_a_key_nothing_is_signed(tmp_path: Path) -> None:
    """As before there were signatures."""
    store = a_store(tmp_path)
    raw = store.get(f"{folder_of(store, Keeper(store).save(1))}/{MANIFEST_NAME}")
    assert decode_manifest(raw).save_id
    with pytest.raises(Untrusted):
        decode_manifest(raw, KEY)


# ---------------------------------------------------------------- read back
class Flipping(FileStore):
    """Loses a bit of every object on its way to the disk."""

    def put(self, key: str, data: Data) -> str:
        raw = bytearray(b"".join(pieces(data)))
        if key.endswith(".distcp"):
            raw[len(raw) // 2] ^= 1
        return super().put(key, bytes(raw))


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Within a minute."""
    give_up_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_at, what
        time.sleep(0.01)


def is_there(store: Store, key: str) -> bool:
    """Whether there is such an object."""
    return any(entry.key == key for entry in store.list(key))


def test_a_checkpoint_is_read_back_when_the_plan_says_so(tmp_path: Path) -> None:
    """And noted as verified; without that it is not."""
    store = a_store(tmp_path)
    keeper = Keeper(store, verify=True)
    note = f"{folder_of(store, keeper.save(1))}/{VERIFIED_NAME}"
    eventually(lambda: is_there(store, note), "the note")
    plain = Keeper(store, attempt=2)
    folder = folder_of(store, plain.save(2))
    plain.save(3)
    assert not is_there(store, f"{folder}/{VERIFIED_NAME}")


def test_what_the_store_has_spoilt_is_noticed_right_after_the_save(tmp_path: Path) -> None:
    """The save counts as failed, the checkpoint is quarantined, and training goes on."""
    store = Flipping(tmp_path / "run", 5.0)
    keeper = Keeper(store, verify=True, saver=lambda arena: Nobody())
    said: list[Said] = []
    saver = Saver([keeper.arena], said.append, lambda uri, endpoint: store)
    assert keeper.checkpointer.save(1, 1, {"model": {"w": torch.ones(4096)}}, {})
    saver.look()
    eventually(lambda: sum(isinstance(each, Came) for each in said) == 2, "the verdict")
    committed, failed = [each.outcome for each in said if isinstance(each, Came)]
    assert isinstance(committed, Committed)
    assert isinstance(failed, SaveFailed)
    assert "what was committed is not what was saved" in failed.error
    assert is_there(store, f"{folder_of(store, committed.checkpoint)}/{QUARANTINE_NAME}")
