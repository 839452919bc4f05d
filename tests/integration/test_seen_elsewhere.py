"""What other checkpoint writers were seen to do, and mend must not: one test for each, with the real saver's code."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lying_proxy import LyingProxy, flipped
from mend.catalog import Catalog, forgotten
from mend.keys import MANIFEST_NAME
from mend.manifest import decode_manifest
from mend.orders import CheckpointPlan
from mend.reports import Committed, Quarantined, Report, SaveFailed
from mend.restore import LEFTOVER_SECONDS
from mend.states import CheckpointRef
from mend.store import Data, Store, open_store
from mend.store.api import pieces
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.procfs import descendants
from s3 import S3Server, ministack
from saver_thread import with_store
from stored_checkpoint import save
from waiting import wait_until

SHARD = "__0_0.distcp"
FLIPS = 300
MOMENTS = ((0, False), (0, True), (2, False))  # request of a save, and whether the server has answered it


def a_state(seed: int) -> dict[str, Any]:
    """Some tensors of several types."""
    drawn = torch.Generator().manual_seed(seed)
    weights = {f"w{n}": torch.randn(60, 50, generator=drawn) for n in range(3)}
    return {"model": {**weights, "half": torch.randn(99, generator=drawn).bfloat16()}, "count": torch.tensor(seed)}


def is_state_of(state: dict[str, Any], seed: int) -> bool:
    """Bit for bit."""
    wanted = a_state(seed)
    same = all(torch.equal(state["model"][name], tensor) for name, tensor in wanted["model"].items())
    return same and torch.equal(state["count"], wanted["count"])


class Keeper:
    """A rank's checkpointer. With `store` its saver is a thread of ours; without, the real process."""

    def __init__(self, uri: str, attempt: int = 1, store: Store | None = None, endpoint: str | None = None) -> None:
        self.reports: list[Report] = []
        self.checkpointer = Checkpointer(
            CheckpointPlan(uri=uri, endpoint=endpoint),
            run="team/clio",
            run_uid="uid-1",
            attempt=attempt,
            report=self.reports.append,
            store=store,
            saver=with_store(store) if store is not None else None,
        )

    def save(self, step: int) -> CheckpointRef:
        """Save the state of that step until it is committed."""
        assert self.checkpointer.save(step, step, a_state(step), {"position": step})
        assert self.checkpointer.wait(60), self.reports
        (ref,) = [each.checkpoint for each in self.reports[-1:] if isinstance(each, Committed)]
        return ref

    def restored(self, *refs: CheckpointRef) -> int:
        """The step that is restored of these, whose state must be that step's, bit for bit."""
        into = a_state(99)
        found = self.checkpointer.restore(refs, into)
        assert found is not None
        assert is_state_of(into, found.step)
        assert found.values == {"position": found.step}
        return found.step


def a_folder(tmp_path: Path) -> tuple[str, Store]:
    """A prefix, and a store on it."""
    uri = f"file://{tmp_path}/run"
    return uri, open_store(uri)


def test_none_of_300_flipped_bits_is_loaded(tmp_path: Path) -> None:
    """Of 300 bits flipped in head, data and tail of a shard none comes into the model; each save is whole without."""
    uri, store = a_folder(tmp_path)
    older, newest = (Keeper(uri, store=store).save(step) for step in (5, 6))
    folder = Path(newest.uri.removeprefix("file://"))
    shard, intact = folder / SHARD, (folder / SHARD).read_bytes()
    entries = decode_manifest((folder / MANIFEST_NAME).read_bytes()).tensors.values()
    chunks = [chunk for entry in entries for chunk in entry.chunks]
    first, last = min(each.start_byte for each in chunks), max(each.start_byte + each.length_bytes for each in chunks)
    drawn = random.Random(7)
    fallen_back = 0
    for number in range(FLIPS):
        chunk = drawn.choice(chunks)
        data = range(chunk.start_byte, chunk.start_byte + chunk.length_bytes)
        place = drawn.choice([range(first), data, range(last, len(intact))][number % 3])
        shard.write_bytes(flipped(intact, place / len(intact) + 1e-12, drawn.randrange(8)))
        (folder / "quarantine.json").unlink(missing_ok=True)
        fallen_back += Keeper(uri, 2, store).restored(newest, older) == 5
    assert fallen_back >= FLIPS // 3  # every flip in the data was seen


def test_the_shard_of_another_step_is_not_loaded(tmp_path: Path) -> None:
    """A shard that is whole, of the right names and sizes, but of the step before, is found out."""
    uri, store = a_folder(tmp_path)
    older, newest = (Keeper(uri, store=store).save(step) for step in (5, 6))
    one, other = (Path(ref.uri.removeprefix("file://")) / SHARD for ref in (older, newest))
    other.write_bytes(one.read_bytes())
    keeper = Keeper(uri, 2, store)
    assert keeper.restored(newest, older) == 5
    assert [each.uri for each in keeper.reports if isinstance(each, Quarantined)] == [newest.uri]


class BreaksOff:
    """A store in which a shard's upload raises once, when half of it is there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.spoils = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: Data) -> str:
        """As the real one, or half of it."""
        if key.endswith(SHARD) and self.spoils:
            self.spoils = False
            whole = b"".join(pieces(data))
            self._store.put(key, whole[: len(whole) // 2])
            raise OSError(5, "Input/output error")
        return self._store.put(key, data)


def test_a_writers_exception_commits_no_truncated_shard(tmp_path: Path) -> None:
    """A save whose upload broke off in the middle is never committed, and the next one is."""
    uri, plain = a_folder(tmp_path)
    keeper = Keeper(uri, store=BreaksOff(plain))  # type: ignore[arg-type]
    assert keeper.checkpointer.save(1, 1, a_state(1), {"position": 1})
    assert not keeper.checkpointer.wait(60)
    assert isinstance(keeper.reports[-1], SaveFailed)
    assert not [entry.key for entry in plain.list("step-") if entry.key.endswith(MANIFEST_NAME)]
    assert Keeper(uri, 2, plain).restored(keeper.save(2)) == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as running:
        yield running


@pytest.fixture
def keys(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For savers, which are processes of their own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(server.credentials.access_key_id))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(server.credentials.secret_access_key))
    monkeypatch.setenv("AWS_REGION", "us-east-1")


WRITER = """
import sys
from mend.store import open_store
open_store(sys.argv[1], sys.argv[2]).put(sys.argv[3], bytes(200 << 20))
"""


@pytest.mark.usefixtures("keys")
def test_the_upload_of_a_killed_writer_is_found_and_aborted(server: S3Server) -> None:
    """A writer that is killed between two parts leaves an upload that nobody sees; mend lists it and ends it."""
    uri = server.uri("orphan")
    store = open_store(uri, server.endpoint, server.credentials)
    key = f"step-000000000003/000001-aaaa/{SHARD}"
    with LyingProxy(server) as proxy:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, uri, proxy.server.endpoint, key])
        trap = proxy.trap(1, writer.kill, method="PUT", part="partNumber=")
        assert trap.sprung.wait(60)
        assert writer.wait(60) == -signal.SIGKILL
    save(store, 9, attempt=2)
    (left,) = store.unfinished("step-")
    assert left.key == key
    later = [
        msgspec.structs.replace(each, modified_at=left.begun_unix_seconds + LEFTOVER_SECONDS + 1)
        for each in Catalog(store).saves()
    ]
    for upload in forgotten(2, later, store.unfinished("step-")):
        store.abandon(upload)
    assert list(store.unfinished("step-")) == []
    assert [entry.key for entry in store.list("step-000000000003/")] == []


def savers() -> list[int]:
    """Processes that save for this one."""
    found = descendants([os.getpid()])
    return [pid for pid in found if b"mend_trainer.checkpoint.saver" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.usefixtures("keys")
def test_a_crash_during_a_save_mixes_nothing(server: S3Server) -> None:
    """Whichever request of a save its saver is killed at, what is committed is of one step; the next saver ends it."""
    with LyingProxy(server) as proxy:
        keeper = Keeper(server.uri("mixed"), endpoint=proxy.server.endpoint)
        store = open_store(server.uri("mixed"), server.endpoint, server.credentials)
        for step, (request, after) in enumerate(MOMENTS):
            trap = proxy.trap(request, kill_savers, method="PUT", part="/step-", after=after)
            ref = keeper.save(step)
            assert trap.sprung.is_set()
            proxy.heal()
            assert Keeper("", 2, store).restored(ref) == step
        committed = [entry.key for entry in store.list("step-") if entry.key.endswith(MANIFEST_NAME)]
        assert len(committed) == len(MOMENTS)
    keeper.checkpointer.close()


def kill_savers() -> None:
    """SIGKILL."""
    for pid in savers():
        os.kill(pid, signal.SIGKILL)


RANK = """
import os, signal, sys, torch
from mend.orders import CheckpointPlan
from mend_trainer.checkpoint import Checkpointer
keeper = Checkpointer(CheckpointPlan(uri=sys.argv[1]), run="t/r", run_uid="uid-1", attempt=1, report=print)
assert keeper.save(1, 1, {"w": torch.zeros(1_000_000)}, {})
assert keeper.wait(60)  # the saver is up, and has told what nobody has read
assert keeper.save(2, 2, {"w": torch.ones(50_000_000)}, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_rank_has_copied_is_committed_without_it(tmp_path: Path) -> None:
    """A rank that is killed right after its copy, with no agent around, leaves a checkpoint that its saver commits."""
    uri, store = a_folder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", RANK, uri]) as rank:
        assert rank.wait(120) == -signal.SIGKILL

    def committed() -> bool:
        return any(entry.key.endswith(MANIFEST_NAME) for entry in store.list("step-000000000002/"))

    wait_until(committed, "step 2 to be committed")
