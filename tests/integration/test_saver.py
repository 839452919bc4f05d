"""The saver and the copy as processes: killed and stopped at any moment, they lose nothing and make nothing up."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import torch

from checkpoint_ranks import copy_until_killed
from gang_of_ranks import ranks
from mend.orders import CheckpointPlan
from mend.reports import Committed, Report, SaveFailed, Skipped
from mend.states import CheckpointRef
from mend.store import open_store
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.links import OwnSaver, SaverLink
from mend_trainer.savers import MESSAGE_BYTES, Guide, Holding, decode_said
from mend_trainer.slots import arena_path
from s3 import FaultyProxy, S3Server, ministack
from saver_thread import with_store
from snapshots_made import a_snapshot

_SECONDS = 60.0
SHARD = "__0_0.distcp"


def until(holds: Callable[[], object], what: str) -> None:
    """Wait until it holds."""
    give_up_at = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < give_up_at, what
        time.sleep(0.005)


def a_state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """A state that differs from step to step."""
    return {"model": {"w": torch.full((1000,), float(step)), "v": torch.arange(7.0) + step}}


class Keeper:
    """A rank alone with a saver process of its own, which a test can kill and stop."""

    def __init__(self, uri: str, endpoint: str | None = None) -> None:
        self.reports: list[Report] = []
        self.saver: OwnSaver | None = None
        self.arena: Arena
        self.checkpointer = Checkpointer(
            CheckpointPlan(uri=uri, endpoint=endpoint),
            run="team/clio",
            run_uid="uid-1",
            attempt=1,
            report=self.reports.append,
            saver=self._own,
        )

    def _own(self, arena: Arena) -> SaverLink:
        self.arena, self.saver = arena, OwnSaver(arena)
        return self.saver

    @property
    def pid(self) -> int:
        """Of its saver."""
        assert self.saver is not None
        assert self.saver.pid is not None
        return self.saver.pid

    def save(self, step: int) -> bool:
        """Save the state of that step."""
        return self.checkpointer.save(step, step * 10, a_state(step), {"step": step})

    def kinds(self) -> list[type]:
        """What was reported."""
        return [type(report) for report in self.reports]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as running:
        yield running


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A store that savers reach as pods do, with what is in their environment."""
    credentials = server.credentials
    assert credentials.access_key_id is not None
    assert credentials.secret_access_key is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", credentials.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", credentials.secret_access_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with FaultyProxy(server) as running:
        yield running


def restored(keeper: Keeper, ref: CheckpointRef) -> int:
    """The step whose state the checkpoint holds, checked in full."""
    into = a_state(-1)
    found = keeper.checkpointer.restore([ref], into)
    assert found is not None
    assert all(torch.equal(into["model"][name], a_state(found.step)["model"][name]) for name in into["model"])
    return found.step


def test_a_saver_killed_while_it_uploads_is_followed_by_one_that_finishes(proxy: FaultyProxy) -> None:
    """kill -9 in the middle of an upload: the next saver commits the same save, once."""
    uri = f"s3://{proxy.server.bucket}/killed-saver"
    keeper = Keeper(uri, proxy.server.endpoint)
    release = proxy.stall(times=1, method="PUT", part=SHARD)
    assert keeper.save(1)
    until(lambda: any(path.endswith(SHARD) for _, path in proxy.requests), "the upload has begun")
    os.kill(keeper.pid, signal.SIGKILL)
    release.set()
    assert keeper.checkpointer.wait(_SECONDS)
    assert keeper.kinds() == [Committed]
    (report,) = keeper.reports
    assert isinstance(report, Committed)
    assert restored(keeper, report.checkpoint) == 1
    names = [entry.key for entry in open_store(uri, proxy.server.endpoint).list("step-")]
    assert len({name.split("/")[1] for name in names}) == 1, "the same save, under the same name"


def test_what_changes_in_memory_between_digest_and_upload_is_not_committed(proxy: FaultyProxy) -> None:
    """A bit that flips while the store holds the upload up is sent, and found: no checkpoint, and the next save is one.

    Who restores from memory meanwhile is not offered it either.
    """
    uri = f"s3://{proxy.server.bucket}/flipped-memory"
    keeper = Keeper(uri, proxy.server.endpoint)
    release = proxy.stall(times=1, method="PUT", part=SHARD)
    assert keeper.save(1)
    until(lambda: sent(proxy), "the upload has begun")
    (flipped,) = keeper.arena.snapshots()
    assert flipped.is_held
    flipped.raw(0)[100] ^= 4
    release.set()
    assert not keeper.checkpointer.wait(_SECONDS)
    (failed,) = keeper.reports
    assert isinstance(failed, SaveFailed)
    assert "rank 0: model.w at [0] (bytes " in failed.error
    assert "ECC" in failed.error
    assert sent(proxy) > 1, "the wrong byte has been with the store"
    assert list(open_store(uri, proxy.server.endpoint).list("")) == []
    assert flipped.is_whole
    assert not flipped.is_held
    assert keeper.save(2)
    assert keeper.checkpointer.wait(_SECONDS)
    last = keeper.reports[-1]
    assert isinstance(last, Committed)
    assert restored(keeper, last.checkpoint) == 2


def sent(proxy: FaultyProxy) -> int:
    """How often a shard was uploaded."""
    return sum(method == "PUT" and path.endswith(SHARD) for method, path in proxy.requests)


def test_training_goes_on_while_the_saver_is_stopped(tmp_path: Path) -> None:
    """A saver that is SIGSTOPped takes nothing: two saves are kept, the others skipped; then both are committed."""
    keeper = Keeper(f"file://{tmp_path}/run")
    assert keeper.save(0)
    assert keeper.checkpointer.wait(_SECONDS)
    os.kill(keeper.pid, signal.SIGSTOP)
    assert [keeper.save(step) for step in range(1, 6)] == [True, True, False, False, False]
    assert [report.step for report in keeper.reports if isinstance(report, Skipped)] == [3], "told once"
    os.kill(keeper.pid, signal.SIGCONT)
    assert keeper.checkpointer.wait(_SECONDS)
    assert sorted(report.checkpoint.step for report in keeper.reports if isinstance(report, Committed)) == [0, 1, 2]


def test_a_saver_that_nobody_listens_to_is_not_held_up(tmp_path: Path) -> None:
    """A rank without an agent reads nothing of what its saver tells: nothing piles up in the channel between them."""
    keeper = Keeper(f"file://{tmp_path}/run")
    assert keeper.save(1)
    assert keeper.checkpointer.wait(_SECONDS)
    assert keeper.save(2)
    assert keeper.checkpointer.wait(_SECONDS)
    assert keeper.saver is not None
    assert keeper.saver._channel is not None
    assert keeper.saver._channel.recv(1 << 16, socket.MSG_DONTWAIT) == b""
    os.kill(keeper.pid, 0)


def test_who_did_not_listen_for_a_while_is_told_what_is_held() -> None:
    """An agent that was frozen while its channel was full hears of the newest snapshot, though nothing more happens."""
    arena = Arena.create("own")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel allows: a few messages
    passed = theirs.fileno(), arena.descriptor
    command = [sys.executable, "-m", "mend_trainer.checkpoint.saver", *map(str, passed)]
    with subprocess.Popen(command, pass_fds=passed) as saver, ours:
        theirs.close()
        for step in range(8):
            snapshot = a_snapshot(arena, step=step, digested=False)
            until(lambda of=snapshot: of.digests is not None, "digested")
        ours.send(msgspec.json.encode(Guide()))
        until(lambda: not unread(ours), "done with the last look, and with telling of it")
        assert newest_told(ours) == 7
        ours.close()
        assert saver.wait(_SECONDS) == 0


def unread(channel: socket.socket) -> int:
    """Bytes that were sent and that the other end has not read."""
    return struct.unpack("i", fcntl.ioctl(channel, termios.TIOCOUTQ, bytes(4)))[0]


def newest_told(channel: socket.socket) -> int:
    """The step of the newest snapshot of which the saver tells, once it is that of the last or nothing more comes."""
    channel.settimeout(10.0)
    step = -1
    with suppress(TimeoutError):
        while step < 7:
            said = decode_said(channel.recv(MESSAGE_BYTES))
            step = max(held.step for held in said.held) if isinstance(said, Holding) and said.held else step
    return step


def test_what_a_store_that_is_away_is_owed_stays_until_it_is_back(proxy: FaultyProxy) -> None:
    """While every PUT is answered by 503 saves are kept, each failure is told, and then they are committed."""
    store = open_store(f"s3://{proxy.server.bucket}/away", proxy.server.endpoint, deadline_seconds=0.3)
    reports: list[Report] = []
    plan = CheckpointPlan(uri=store.uri)
    keeper = Checkpointer(plan, run="r", run_uid="u", attempt=1, report=reports.append, saver=with_store(store))
    proxy.answer_with(503, times=10_000, method="PUT")
    assert keeper.save(1, 1, a_state(1), {})
    assert not keeper.wait(1.0)
    assert keeper.in_flight
    proxy.heal()
    assert keeper.wait(_SECONDS)
    assert keeper.committed_step == 1


def test_weights_that_do_not_follow_the_training_are_not_saved(tmp_path: Path) -> None:
    """A model that is, bit for bit, as in the save before fails the save, with words; unless it may be."""
    for may_repeat, kinds in ((False, [Committed, SaveFailed]), (True, [Committed, Committed])):
        store = open_store(f"file://{tmp_path}/{may_repeat}")
        reports: list[Report] = []
        keeper = Checkpointer(
            CheckpointPlan(uri=store.uri),
            run="r",
            run_uid="u",
            attempt=1,
            report=reports.append,
            saver=with_store(store),
            may_repeat=may_repeat,
        )
        state = {**a_state(1), "optimizer": {"step": torch.tensor(1.0)}}
        assert keeper.save(1, 1, state, {})
        keeper.wait(_SECONDS)
        state["optimizer"]["step"].add_(1)
        assert keeper.save(2, 2, state, {})
        keeper.wait(_SECONDS)
        assert [type(report) for report in reports] == kinds
        assert bool(list(store.list("step-000000000002/"))) is may_repeat


def test_a_rank_killed_at_any_moment_leaves_only_whole_snapshots(tmp_path: Path) -> None:
    """20 times kill -9 while a rank does nothing but copy: what counts as a snapshot is one state, bit for bit."""
    drawn = random.Random(11)
    torn = 0
    for number in range(20):
        arena = Arena.create("copied")
        with ranks(1, tmp_path / str(number), copy_until_killed, arena_path(arena.descriptor)) as gang:
            until(lambda: len(arena.snapshots()) == 2, "the rank copies")  # noqa: B023
            time.sleep(drawn.uniform(0, 0.05))
            gang[0].kill()
        snapshots = arena.snapshots()
        assert snapshots
        torn += len(snapshots) < 2
        for snapshot in snapshots:
            step = snapshot.header.origin.step
            values = torch.frombuffer(snapshot.raw(0), dtype=torch.int64)
            assert bool((values == step).all())
    assert torn > 0, "some of the kills came in the middle of a copy"
