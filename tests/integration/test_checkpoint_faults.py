"""A damaged checkpoint is never restored, and a store that misbehaves never breaks the training."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mend.keys import DCP_METADATA_NAME, MANIFEST_NAME, QUARANTINE_NAME
from mend.manifest import MANIFEST_VERSION, decode_manifest, encode_manifest
from mend.orders import CheckpointPlan
from mend.reports import Committed, Quarantined, Report, SaveFailed, Skipped
from mend.states import CheckpointRef
from mend.store import Forbidden, Store, Unreachable, open_store
from mend.store.files import FileStore
from mend.store.s3 import S3Store
from mend_trainer.checkpoint import Checkpointer, CheckpointsUnreadable, MisfitError
from s3 import FaultyProxy, S3Server, ministack, rclone
from saver_thread import with_store

SHARD = "__0_0.distcp"


def a_state(seed: int) -> dict[str, Any]:
    """A state with tensors of several types, one of them not contiguous, one empty, one a scalar."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "weight": torch.randn(40, 33, generator=drawn),
            "half": torch.randn(17, generator=drawn).bfloat16(),
            "turned": torch.randn(5, 7, generator=drawn).t(),
            "conjugate": torch.randn(9, dtype=torch.complex64, generator=drawn).conj(),
            "empty": torch.empty(0, 3),
        },
        "optimizer": {"step": torch.tensor(float(seed)), "count": torch.tensor([seed])},
        "ranks": {"0": {"rng": torch.randint(0, 255, (2000,), generator=drawn, dtype=torch.uint8)}},
    }


def flat(state: dict[str, Any], path: str = "") -> dict[str, torch.Tensor]:
    """All tensors by name."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both states are the same, bit for bit."""
    ours, theirs = flat(one), flat(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Keeper:
    """A checkpointer of one rank and what it reported."""

    def __init__(self, uri: str, attempt: int = 1, store: Store | None = None, save_seconds: float = 60.0) -> None:
        self.reports: list[Report] = []
        plan = CheckpointPlan(uri=uri)
        self.checkpointer = Checkpointer(
            plan,
            run="team/clio",
            run_uid="uid-1",
            attempt=attempt,
            report=self.reports.append,
            store=store,
            saver=with_store(store or open_store(uri)),
            save_seconds=save_seconds,
        )

    def save(self, step: int) -> CheckpointRef:
        """Save the state of that step and wait until it is committed."""
        assert self.checkpointer.save(step, step * 10, a_state(step), {"position": step, "seed": 2**80 + step})
        assert self.checkpointer.wait(60), self.reports
        last = self.reports[-1]
        assert isinstance(last, Committed)
        return last.checkpoint


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/run"


def folder_of(ref: CheckpointRef) -> Path:
    """Where a checkpoint's files are."""
    return Path(ref.uri.removeprefix("file://"))


class FlipsOnTheWay(FileStore):
    """A store whose first answer with data has one bit flipped, as bad memory in a switch or a proxy does it."""

    flips = 1

    def get_into(self, key: str, into: memoryview, start: int = 0, if_match: str = "") -> None:
        """As the real one, but for the bit."""
        super().get_into(key, into, start, if_match)
        if key.endswith(SHARD) and self.flips:
            self.flips -= 1
            into[len(into) // 2] ^= 1


def test_a_bit_that_was_flipped_on_the_way_condemns_nothing(uri: str) -> None:
    """What is stored is sound: it is read once more, restored, and not quarantined."""
    ref = Keeper(uri).save(5)
    store = FlipsOnTheWay(Path(uri.removeprefix("file://")), 5.0)
    into = a_state(99)
    restored = Keeper(uri, 2, store).checkpointer.restore([ref], into)
    assert restored is not None
    assert store.flips == 0
    assert equal(into, a_state(5))
    assert not (folder_of(ref) / QUARANTINE_NAME).exists()


def test_what_was_saved_is_restored_in_place(uri: str) -> None:
    """Tensors of every kind come back bit for bit into the very tensors that were given, with the plain values."""
    ref = Keeper(uri).save(5)
    into = a_state(99)
    before = flat(into)
    restored = Keeper(uri, 2).checkpointer.restore([ref], into)
    assert equal(into, a_state(5))
    assert all(tensor is before[name] for name, tensor in flat(into).items())
    assert restored is not None
    assert (restored.ref, restored.step, restored.tokens, restored.values["seed"]) == (ref, 5, 50, 2**80 + 5)


def test_nothing_to_restore_is_a_fresh_start(uri: str) -> None:
    """Without candidates nothing is restored and nothing is raised."""
    assert Keeper(uri).checkpointer.restore([], a_state(1)) is None


def test_a_copy_cannot_be_changed_by_the_training_that_goes_on(uri: str) -> None:
    """What is committed is the state at the call of save, although the tensors change while it is written."""
    keeper = Keeper(uri)
    state = a_state(3)
    values = {"loader": {"position": 3}}
    assert keeper.checkpointer.save(3, 30, state, values)
    for tensor in flat(state).values():
        tensor.zero_()
    values["loader"]["position"] = 4
    assert keeper.checkpointer.wait(60)
    into = a_state(99)
    restored = keeper.checkpointer.restore([keeper.reports[0].checkpoint], into)  # type: ignore[union-attr]
    assert equal(into, a_state(3))
    assert restored is not None
    assert restored.values == {"loader": {"position": 3}}


def test_other_tools_read_a_checkpoint(uri: str, tmp_path: Path) -> None:
    """Stock dcp.load and the converter to torch.save's format read what mend wrote."""
    ref = Keeper(uri).save(5)
    into = a_state(99)
    stock.load(into, checkpoint_id=folder_of(ref), no_dist=True)
    assert equal(into, a_state(5))
    dcp_to_torch_save(folder_of(ref), tmp_path / "one.pt")
    assert equal(torch.load(tmp_path / "one.pt", weights_only=True), a_state(5))


def test_mend_needs_no_pickle(uri: str) -> None:
    """A checkpoint whose `.metadata` is gone, or says something else, restores all the same."""
    ref = Keeper(uri).save(5)
    (folder_of(ref) / DCP_METADATA_NAME).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    into = a_state(99)
    assert Keeper(uri, 2).checkpointer.restore([ref], into)
    assert equal(into, a_state(5))


def test_the_layout_follows_the_state(uri: str) -> None:
    """When tensors appear, go or change their shape between saves, each save holds what was there."""
    keeper = Keeper(uri)
    for step, state in enumerate(
        [{"a": torch.ones(3)}, {"a": torch.ones(4), "b": torch.ones(1)}, {"b": torch.ones(2)}]
    ):
        assert keeper.checkpointer.save(step, 0, state, {})
        assert keeper.checkpointer.wait(60)
        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        keeper.checkpointer.restore([keeper.reports[-1].checkpoint], into)  # type: ignore[union-attr]
        assert equal(into, state)


def flip(path: Path, position: int, bit: int = 4) -> None:
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def swap(source: CheckpointRef, target: CheckpointRef, name: str) -> None:
    """Put a file of one checkpoint in the place of another's."""
    shutil.copyfile(folder_of(source) / name, folder_of(target) / name)


def a_raw_byte(ref: CheckpointRef, name: str) -> int:
    """Where in the shard a tensor's data begins."""
    return decode_manifest((folder_of(ref) / MANIFEST_NAME).read_bytes()).tensors[name].chunks[0].start_byte


def rewritten(ref: CheckpointRef, **changes: Any) -> None:
    """Replace fields of the manifest, sealed anew."""
    path = folder_of(ref) / MANIFEST_NAME
    path.write_bytes(encode_manifest(msgspec.structs.replace(decode_manifest(path.read_bytes()), **changes)))


DAMAGES: dict[str, Callable[[CheckpointRef, CheckpointRef], object]] = {
    "a truncated shard": lambda newest, older: os.truncate(folder_of(newest) / SHARD, 3000),
    "an empty shard": lambda newest, older: os.truncate(folder_of(newest) / SHARD, 0),
    "a missing shard": lambda newest, older: (folder_of(newest) / SHARD).unlink(),
    "a bit in a large tensor": lambda n, o: flip(folder_of(n) / SHARD, a_raw_byte(n, "model.weight") + 1234),
    "a bit in a scalar": lambda n, o: flip(folder_of(n) / SHARD, a_raw_byte(n, "optimizer.step") + 3, 0),
    "a bit in an RNG state": lambda n, o: flip(folder_of(n) / SHARD, a_raw_byte(n, "ranks.0.rng") + 1999),
    "the shard of another step": lambda n, o: swap(o, n, SHARD),
    "the manifest of another step": lambda n, o: swap(o, n, MANIFEST_NAME),
    "a garbage manifest": lambda n, o: (folder_of(n) / MANIFEST_NAME).write_bytes(b"<html>busy</html>"),
    "an empty manifest": lambda n, o: (folder_of(n) / MANIFEST_NAME).write_bytes(b""),
    "a bit in the manifest": lambda n, o: flip(folder_of(n) / MANIFEST_NAME, 300, 0),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_taken(uri: str, damage: str) -> None:
    """Damage of any kind is noticed, marked in the store, reported, and the checkpoint before is restored whole."""
    older, newest = (Keeper(uri).save(step) for step in (5, 6))
    DAMAGES[damage](newest, older)
    keeper = Keeper(uri, 2)
    into = a_state(99)
    restored = keeper.checkpointer.restore([newest, older], into)
    assert restored is not None
    assert restored.step == 5
    assert equal(into, a_state(5))
    (report,) = keeper.reports
    assert isinstance(report, Quarantined)
    assert report.uri == newest.uri
    note = json.loads((folder_of(newest) / QUARANTINE_NAME).read_bytes())
    assert note["reason"] == report.reason
    assert not (folder_of(older) / QUARANTINE_NAME).exists()


def test_no_single_flipped_bit_restores_a_wrong_state(uri: str) -> None:
    """Wherever in the shard a bit flips, in data, headers or padding, the state restored is one that was saved."""
    older, newest = (Keeper(uri).save(step) for step in (5, 6))
    shard = folder_of(newest) / SHARD
    intact = shard.read_bytes()
    drawn = random.Random(7)
    fallen_back = 0
    for _ in range(150):
        flip(shard, drawn.randrange(len(intact)), drawn.randrange(8))
        into = a_state(99)
        restored = Keeper(uri, 2).checkpointer.restore([newest, older], into)
        assert restored is not None
        assert equal(into, a_state(restored.step))
        fallen_back += restored.step == 5
        shard.write_bytes(intact)
    assert fallen_back > 0


def test_a_checkpoint_without_manifest_is_passed_over_unmarked(uri: str) -> None:
    """A candidate that is gone is passed over and reported; nothing is written where nothing is."""
    older, newest = (Keeper(uri).save(step) for step in (5, 6))
    shutil.rmtree(folder_of(newest))
    keeper = Keeper(uri, 2)
    restored = keeper.checkpointer.restore([newest, older], a_state(99))
    assert restored is not None
    assert restored.step == 5
    assert not folder_of(newest).exists()
    assert isinstance(keeper.reports[0], Quarantined)


def test_a_newer_manifest_is_passed_over_unmarked(uri: str) -> None:
    """What a newer mend wrote is not damaged: it is left unmarked, and the error advises to upgrade."""
    ref = Keeper(uri).save(5)
    rewritten(ref, version=MANIFEST_VERSION + 1)
    with pytest.raises(CheckpointsUnreadable, match="upgrade mend"):
        Keeper(uri, 2).checkpointer.restore([ref], a_state(99))
    assert not (folder_of(ref) / QUARANTINE_NAME).exists()


def test_when_no_checkpoint_is_left_all_reasons_are_told(uri: str) -> None:
    """If every candidate is damaged, the error names each of them and why."""
    refs = [Keeper(uri).save(step) for step in (5, 6)]
    for ref in refs:
        os.truncate(folder_of(ref) / SHARD, 100)
    with pytest.raises(CheckpointsUnreadable) as raised:
        Keeper(uri, 2).checkpointer.restore(refs, a_state(99))
    assert all(ref.uri in str(raised.value) for ref in refs)


def test_a_copied_prefix_is_as_good_as_the_original(uri: str, tmp_path: Path) -> None:
    """A prefix copied elsewhere has other ETags; the digests still prove its checkpoints."""
    ref = Keeper(uri).save(5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    moved = msgspec.structs.replace(ref, uri=ref.uri.replace("/run/", "/copy/"))
    into = a_state(99)
    assert Keeper(f"file://{tmp_path}/copy", 2).checkpointer.restore([moved], into)
    assert equal(into, a_state(5))


def test_a_checkpoint_of_another_model_is_named_tensor_by_tensor(uri: str) -> None:
    """A misfit names every tensor that differs, is fatal, and leaves the checkpoint unmarked."""
    ref = Keeper(uri).save(5)
    other = a_state(99)
    other["model"] = {"weight": torch.zeros(40, 34), "half": torch.zeros(17), "extra": torch.zeros(2)}
    keeper = Keeper(uri, 2)
    with pytest.raises(MisfitError) as raised:
        keeper.checkpointer.restore([ref], other)
    assert raised.value.mend_fatal
    assert raised.value.problems == (
        "model.weight: float32 [40, 33] in the checkpoint, float32 [40, 34] in the model",
        "model.half: bfloat16 [17] in the checkpoint, float32 [17] in the model",
        "model.extra: float32 [2] in the model, missing in the checkpoint",
        "model.conjugate: complex64 [9] in the checkpoint, unknown to the model",
        "model.empty: float32 [0, 3] in the checkpoint, unknown to the model",
        "model.turned: float32 [7, 5] in the checkpoint, unknown to the model",
    )
    assert not (folder_of(ref) / QUARANTINE_NAME).exists()
    assert keeper.reports == []


def test_a_full_disk_fails_the_save_and_not_the_training(uri: str) -> None:
    """When the disk is full a save fails softly, leaves nothing behind, and the next one that fits works."""
    program = """
import resource, sys, torch
from mend.orders import CheckpointPlan
from mend_trainer.checkpoint import Checkpointer
reports = []
keeper = Checkpointer(CheckpointPlan(uri=sys.argv[1]), run="t/r", run_uid="u", attempt=1, report=reports.append)
# Its saver is started by the first save, and has this limit as well.
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
assert keeper.save(1, 0, {"w": torch.zeros(100_000)}, {})
assert not keeper.wait(60)
assert keeper.save(2, 0, {"w": torch.zeros(100)}, {})
assert keeper.wait(60)
print([type(report).__name__ for report in reports], reports[0].error)
"""
    done = subprocess.run([sys.executable, "-c", program, uri], capture_output=True, text=True, check=True)
    assert "['SaveFailed', 'Committed']" in done.stdout
    assert "spec.checkpoint.keepLast" in done.stdout
    assert [entry.key[:17] for entry in open_store(uri).list("step-", delimiter="/")] == ["step-000000000002"]


@pytest.mark.parametrize("values", [{"loss": float("nan")}, {"inf": float("inf")}, {"odd": object()}])
def test_values_that_json_cannot_hold_are_refused(uri: str, values: dict[str, Any]) -> None:
    """Plain values that would not come back as they were are refused before anything is saved."""
    with pytest.raises((TypeError, ValueError)):
        Keeper(uri).checkpointer.save(1, 0, a_state(1), values)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server) as running:
        yield running


def a_bucket(server: S3Server, prefix: str, deadline_seconds: float = 30.0) -> S3Store:
    """The store of a run behind the server or proxy."""
    return S3Store(server.bucket, prefix, server.endpoint, server.credentials, deadline_seconds)


def test_saving_and_restoring_outlast_a_busy_store(proxy: FaultyProxy) -> None:
    """5xx and cut answers, while saving and while restoring, only cost time."""
    store = a_bucket(proxy.server, "busy")
    proxy.answer_with(503, times=3)
    ref = Keeper("", store=store).save(5)
    proxy.answer_with(500, times=2, method="GET")
    proxy.cut_answers(times=3)
    into = a_state(99)
    restoring = Keeper("", 2, store)
    assert restoring.checkpointer.restore([ref], into)
    assert equal(into, a_state(5))
    assert restoring.reports == []


def test_a_store_that_stays_away_fails_the_save_softly(proxy: FaultyProxy) -> None:
    """When the store does not recover in time the save fails, nothing is committed, and the next save works."""
    keeper = Keeper("", store=a_bucket(proxy.server, "away", deadline_seconds=0.5), save_seconds=1.0)
    proxy.answer_with(503, times=1000, method="PUT")
    assert keeper.checkpointer.save(1, 0, a_state(1), {})
    assert not keeper.checkpointer.wait(60)
    (failed,) = keeper.reports
    assert isinstance(failed, SaveFailed)
    assert "HTTP 503" in failed.error
    proxy.heal()
    assert keeper.save(2).step == keeper.checkpointer.committed_step == 2


def test_an_unreachable_store_is_never_called_a_damaged_checkpoint(proxy: FaultyProxy) -> None:
    """When shards cannot be read just now the error says so; nothing is quarantined and a later try restores."""
    ref = Keeper("", store=a_bucket(proxy.server, "unreachable")).save(5)
    keeper = Keeper("", 2, a_bucket(proxy.server, "unreachable", deadline_seconds=0.5))
    proxy.answer_with(503, times=1000, part=SHARD)
    with pytest.raises(Unreachable, match="503"):
        keeper.checkpointer.restore([ref], a_state(99))
    assert keeper.reports == []
    proxy.heal()
    assert keeper.checkpointer.restore([ref], a_state(99))


def test_a_forbidden_store_is_told_as_such_when_restoring(proxy: FaultyProxy) -> None:
    """Credentials that may list but not read are told which rights they lack; nothing is quarantined."""
    store = a_bucket(proxy.server, "forbidden")
    ref = Keeper("", store=store).save(5)
    proxy.answer_with(403, times=1, method="GET", part=MANIFEST_NAME)
    keeper = Keeper("", 2, store)
    with pytest.raises(Forbidden, match="list, get, put and delete"):
        keeper.checkpointer.restore([ref], a_state(99))
    assert keeper.reports == []


def test_a_slow_upload_does_not_stop_the_training(proxy: FaultyProxy) -> None:
    """While the store does not answer, one more is kept, saves that fall due then are skipped, and the loop goes on."""
    keeper = Keeper("", store=a_bucket(proxy.server, "slow"))
    release = proxy.stall(times=1, method="PUT", part=SHARD)
    assert keeper.checkpointer.save(1, 10, a_state(1), {})
    assert keeper.checkpointer.save(2, 20, a_state(2), {})
    for step in range(3, 6):
        assert not keeper.checkpointer.save(step, 10, a_state(step), {})
    assert [report.step for report in keeper.reports if isinstance(report, Skipped)] == [3], "told once"
    assert keeper.checkpointer.in_flight
    release.set()
    assert keeper.checkpointer.wait(60)
    assert keeper.checkpointer.committed_step == 2


def test_a_shard_replaced_in_the_bucket_is_noticed(server: S3Server) -> None:
    """A shard of another step in place of the right one is noticed in a bucket as it is in a folder."""
    store = a_bucket(server, "replaced")
    older, newest = (Keeper("", store=store).save(step) for step in (5, 6))
    keys = [ref.uri.removeprefix(f"{store.uri}/") + f"/{SHARD}" for ref in (older, newest)]
    store.put(keys[1], store.get(keys[0]))
    into = a_state(99)
    restored = Keeper("", 2, store).checkpointer.restore([newest, older], into)
    assert restored is not None
    assert restored.step == 5
    assert equal(into, a_state(5))


def test_a_store_that_ignores_conditions_still_keeps_checkpoints(tmp_path: Path) -> None:
    """Saving and restoring work on a server that ignores conditional writes."""
    with rclone(tmp_path) as server:
        store = open_store(server.uri("run"), server.endpoint, server.credentials)
        ref = Keeper("", store=store).save(5)
        into = a_state(99)
        assert Keeper("", 2, store).checkpointer.restore([ref], into)
        assert equal(into, a_state(5))
