"""Checkpoints of several real ranks: exact to the bit, at any world size, and never committed by halves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as stock

from checkpoint_ranks import (
    restore_into,
    save_and_wait_to_be_killed,
    save_twice_with_a_fault,
    save_while_busy,
    train,
    train_in_memory,
)
from gang_of_ranks import Rank, ranks, run_ranks
from mend.keys import MANIFEST_NAME
from mend.manifest import decode_manifest
from mend.reports import Committed, SaveFailed
from mend.states import Ancestor, CheckpointRef
from mend.store import open_store
from saver_thread import WorkersSaver


def a_run(folder: Path) -> str:
    """The address of an empty prefix."""
    return f"file://{folder}/run"


def committed(uri: str) -> list[int]:
    """Steps of the checkpoints that have a manifest."""
    store = open_store(uri)
    keys = [entry.key for entry in store.list("step-") if entry.key.endswith(f"/{MANIFEST_NAME}")]
    return [decode_manifest(store.get(key)).step for key in keys]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Two ranks that resume from a checkpoint have the losses and weights of two that were never interrupted."""
    uri = a_run(tmp_path)
    unbroken = run_ranks(2, tmp_path / "a", train, kind, uri, 1, 1, 6, {3}, [])
    resumed = run_ranks(2, tmp_path / "b", train, kind, uri, 2, 4, 6, {5}, unbroken[0]["refs"])
    assert [rank["losses"] for rank in resumed] == [rank["losses"][3:] for rank in unbroken]
    assert resumed[0]["weights"] == unbroken[0]["weights"] == resumed[1]["weights"]
    restored = resumed[1]["restored"]
    assert (restored.step, restored.tokens, restored.world_size, restored.absent) == (3, 72, 2, ())
    store = open_store(uri)
    manifest = decode_manifest(store.get(resumed[0]["refs"][0].uri.removeprefix(f"{uri}/") + f"/{MANIFEST_NAME}"))
    assert manifest.lineage == (Ancestor(attempt=1, step=3, uid="uid-1"),)
    assert not resumed[1]["refs"]  # only rank 0 reports


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [(2, 1, ("fsdp", "ddp")), (1, 2, ("ddp", "fsdp")), (2, 3, ("fsdp", "fsdp"))],
)
def test_a_checkpoint_loads_at_any_world_size(before: int, after: int, kinds: tuple[str, str], tmp_path: Path) -> None:
    """Weights saved by so many ranks in one layout are those that other ranks load in another."""
    uri = a_run(tmp_path)
    saved = run_ranks(before, tmp_path / "a", train, kinds[0], uri, 1, 1, 2, {2}, [])
    loaded = run_ranks(after, tmp_path / "b", train, kinds[1], uri, 2, 3, 2, set(), saved[0]["refs"])
    for rank, seen in enumerate(loaded):
        assert seen["weights"] == saved[0]["weights"]
        assert seen["restored"].absent == (() if rank < before else (f"ranks.{rank}.cpu",))


def test_every_replica_is_written_once_and_stock_torch_reads_it(tmp_path: Path) -> None:
    """What DDP holds on each rank is stored once, shared out among the ranks, and loads with plain dcp.load."""
    uri = a_run(tmp_path)
    (ref,) = run_ranks(2, tmp_path / "a", train, "ddp", uri, 1, 1, 2, {2}, [])[0]["refs"]
    folder = Path(ref.uri.removeprefix("file://"))
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
    assert {stored.key for stored in manifest.objects} == {"__0_0.distcp", "__1_0.distcp"}
    assert all(len(entry.chunks) == 1 for entry in manifest.tensors.values())
    weight = {"model": {"0.weight": torch.zeros(15, 6)}}
    stock.load(weight, checkpoint_id=folder, no_dist=True)
    again = run_ranks(1, tmp_path / "b", train, "ddp", uri, 2, 3, 2, set(), [ref])
    assert weight["model"]["0.weight"].flatten().tolist() == again[0]["weights"]["0.weight"]


@pytest.mark.parametrize(
    ("after", "kinds"), [(2, ("ddp", "ddp")), (2, ("fsdp", "fsdp")), (1, ("fsdp", "ddp")), (3, ("ddp", "fsdp"))]
)
def test_memory_is_as_good_as_a_store_at_any_world_size(after: int, kinds: tuple[str, str], tmp_path: Path) -> None:
    """What two ranks left in shared memory is taken up by as many or others, in the same layout or another."""
    worker = WorkersSaver(3)
    environments = [worker.arenas.environment(place) for place in range(3)]
    saved = run_ranks(2, tmp_path / "a", train_in_memory, kinds[0], environments, 1, 1, 3, "")
    save_id = worker.wait_for_whole(step=3, ranks=(0, 1))
    loaded = run_ranks(after, tmp_path / "b", train_in_memory, kinds[1], environments, 2, 4, 5, save_id)
    worker.close()
    for rank, seen in enumerate(loaded):
        assert seen["taken up"] == saved[0]["weights"]
        assert seen["restored"].lineage == (Ancestor(attempt=1, step=3, uid="uid-1"),)
        assert seen["restored"].absent == (() if rank < 2 else (f"ranks.{rank}.cpu",))


def test_a_writer_that_fails_on_one_rank_commits_nothing(tmp_path: Path) -> None:
    """When one rank cannot write, no rank takes the save for committed, training goes on, and the next save works."""
    uri = a_run(tmp_path)
    seen = run_ranks(2, tmp_path / "a", save_twice_with_a_fault, uri, "raise", str(tmp_path / "sign"))
    assert [(rank["committed"], rank["again"], rank["step"]) for rank in seen] == [(False, True, 3)] * 2
    kinds = [type(report) for report in seen[0]["reports"]]
    assert kinds == [Committed, SaveFailed, Committed]
    assert "rank 1: OSError" in seen[0]["reports"][1].error
    assert committed(uri) == [1, 3]
    left = [entry.key for entry in open_store(uri).list("step-000000000002/")]
    assert left == []


def wait_for(path: Path, gang: list[Rank]) -> None:
    """Until a rank has made the file."""
    give_up_at = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < give_up_at, f"no rank has come so far: {[each.process.exitcode for each in gang]}"
        time.sleep(0.01)


def test_a_save_outlives_all_ranks(tmp_path: Path) -> None:
    """All ranks killed by -9 right after save() has returned: the checkpoint is committed all the same, and loads."""
    uri = a_run(tmp_path)
    sign = tmp_path / "sign"
    with ranks(2, tmp_path / "a", save_and_wait_to_be_killed, uri, str(sign)) as gang:
        for rank in gang:
            wait_for(tmp_path / f"sign-{rank.rank}", gang)
        for rank in gang:
            rank.kill()
    ref = a_checkpoint(uri, 1)
    (loaded,) = run_ranks(1, tmp_path / "b", restore_into, uri, [ref], 64)
    assert loaded["model"]["w"] == [float(number) for number in range(64)]


def a_checkpoint(uri: str, step: int, seconds: float = 60.0) -> CheckpointRef:
    """The checkpoint of that step, once it is committed and its shares are gone."""
    store = open_store(uri)
    give_up_at = time.monotonic() + seconds
    while True:
        keys = [entry.key for entry in store.list(f"step-{step:012d}/")]
        if any(key.endswith(MANIFEST_NAME) for key in keys) and not any("/share-" in key for key in keys):
            return CheckpointRef(uri=f"{uri}/{keys[0].rpartition('/')[0]}", step=step, attempt=1)
        assert time.monotonic() < give_up_at, keys
        time.sleep(0.02)


def test_all_ranks_skip_a_save_while_one_is_busy(tmp_path: Path) -> None:
    """A save due while any rank still owes the two before is skipped by all ranks alike."""
    uri = a_run(tmp_path)
    seen = run_ranks(2, tmp_path / "a", save_while_busy, uri, str(tmp_path / "sign"), str(tmp_path / "go"))
    assert seen == [[True, True, False, True, True, True]] * 2
    assert committed(uri) == [1, 2, 4]


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    """Damage that only one rank reads makes all ranks take the checkpoint before."""
    uri = a_run(tmp_path)
    seen = run_ranks(2, tmp_path / "a", train, "fsdp", uri, 1, 1, 2, {1, 2}, [])
    older, newest = seen[0]["refs"]
    damage(newest)
    loaded = run_ranks(2, tmp_path / "b", train, "fsdp", uri, 2, 2, 2, set(), [newest, older])
    assert [rank["restored"].step for rank in loaded] == [1, 1]
    assert loaded[0]["losses"] == seen[0]["losses"][1:]
    assert loaded[0]["reports"][0].uri == newest.uri
    assert loaded[1]["reports"] == []


def damage(ref: CheckpointRef) -> None:
    """Flip one bit of the data that only rank 1 reads back."""
    folder = Path(ref.uri.removeprefix("file://"))
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
    chunk = manifest.tensors["model.0.weight"].chunks[-1]
    assert chunk.offsets[0] > 0
    shard = bytearray((folder / chunk.key).read_bytes())
    shard[chunk.start_byte + 3] ^= 0x10
    (folder / chunk.key).write_bytes(shard)
