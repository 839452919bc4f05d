"""A state in the worker's own memory: what a rank makes of it in one process, with the agent's part played here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mend.protocol import ENV_ARENA, ENV_ARENAS, ENV_LAUNCH, CheckpointPlan, CheckpointRef, ExitCode, Launch, encode
from mend.store import open_store
from mend_trainer.alone import next_attempt
from mend_trainer.checkpoint import Checkpointer, CheckpointsUnreadable
from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.checkpoint.writer import digest_all
from mend_trainer.session import Session
from saver_thread import WorkersSaver

STEPS = 4


@pytest.fixture
def worker() -> Iterator[WorkersSaver]:
    """The saver and the arenas of a worker of one rank."""
    saver = WorkersSaver(1)
    yield saver
    saver.close()


def a_plan(folder: Path) -> CheckpointPlan:
    """Snapshots in memory after each second step; the store gets the last alone."""
    return CheckpointPlan(uri=f"file://{folder}/run", memory_interval_steps=2)


def a_launch(folder: Path) -> Launch:
    """The first attempt of a run of one rank."""
    return Launch(
        attempt=1,
        world_size=1,
        first_rank=0,
        ranks=1,
        workers=1,
        master_addr="",
        master_port=0,
        run="tests/run",
        run_uid="uid",
        checkpoint=a_plan(folder),
    )


def a_checkpointer(folder: Path, arena: Arena) -> Checkpointer:
    """Of a run of one rank with that arena."""
    return Checkpointer(
        a_plan(folder), run="tests/run", run_uid="uid", attempt=1, report=lambda report: None, arena=arena
    )


def a_state(value: float) -> dict[str, Any]:
    """Two tensors of that value."""
    return {"model": {"v": torch.full((8,), value), "w": torch.full((8,), value)}}


def in_memory(snapshot: Snapshot) -> CheckpointRef:
    """The candidate that the controller makes of it."""
    header = snapshot.header
    return CheckpointRef(uri=f"memory:{header.save_id}", step=header.origin.step, attempt=header.origin.attempt)


def train(launch: Launch, worker: WorkersSaver, monkeypatch: pytest.MonkeyPatch, *, dies: bool) -> list[int]:
    """The steps that were done; `dies`: before the last state is on its way to the store."""
    for name, value in {ENV_LAUNCH: encode(launch).decode(), **worker.arenas.environment(0)}.items():
        monkeypatch.setenv(name, value)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = []
    session = Session[torch.Tensor](model=model, optimizer=optimizer)
    with session:
        for step in session.steps(STEPS):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            session.completed(0.0)
            done.append(step)
        if dies:
            raise ZeroDivisionError
    return done


def test_a_last_step_that_only_memory_holds_is_saved(
    worker: WorkersSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is started anew with nothing left to train commits what it found in memory before it succeeds."""
    plan = a_plan(tmp_path)
    launch = a_launch(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(launch, worker, monkeypatch, dies=True)
    saved = worker.wait_for_whole(STEPS - 1, (0,))
    assert next_attempt(open_store(plan.uri)) == (1, ())
    ref = CheckpointRef(uri=f"memory:{saved}", step=STEPS - 1, attempt=1)
    again = replace(launch, attempt=2, restore=(ref,))
    assert train(again, worker, monkeypatch, dies=False) == []
    assert [each.step for each in next_attempt(open_store(plan.uri))[1]] == [STEPS - 1]


def test_a_state_that_came_in_part_is_nothing_to_begin_with(tmp_path: Path) -> None:
    """Where memory alone has a state, and it proves damaged while it is read, the rank does not go on as if anew."""
    arena = Arena.create("own")
    checkpointer = a_checkpointer(tmp_path, arena)
    assert checkpointer.save(7, 7, a_state(7.0), {}, owed=False)
    (snapshot,) = arena.snapshots()
    snapshot.add_digests(digest_all(snapshot))
    snapshot.raw(1)[3] ^= 1
    with pytest.raises(CheckpointsUnreadable, match="do not have their digest"):
        checkpointer.restore([in_memory(snapshot)], a_state(0.0))


def test_a_state_that_memory_has_lost_leaves_a_fresh_start(tmp_path: Path) -> None:
    """What is not there is not read, so nothing has been touched."""
    checkpointer = a_checkpointer(tmp_path, Arena.create("own"))
    state = a_state(0.0)
    assert checkpointer.restore([CheckpointRef(uri="memory:feed", step=7, attempt=1)], state) is None
    assert torch.equal(state["model"]["w"], torch.zeros(8))


def test_memory_that_may_not_be_opened_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a rank of another user than the agent's: it has its own, passes over the agent's, and can be measured."""
    for name in (ENV_ARENA, ENV_ARENAS):
        monkeypatch.setenv(name, str(tmp_path / "not-to-be-opened"))
    checkpointer = a_checkpointer(tmp_path, Arena.create("own"))
    assert checkpointer.bytes_in_memory > 0
    assert checkpointer.restore([CheckpointRef(uri="memory:feed", step=7, attempt=1)], a_state(0.0)) is None


def test_a_rank_that_has_trained_is_nothing_to_begin_with(tmp_path: Path) -> None:
    """One that rejoins where nothing can be restored ends, with a code that is held against no machine."""
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session[torch.Tensor](model=model, optimizer=optimizer)
    with session:
        session.completed(0.0)
        with pytest.raises(SystemExit) as ended:
            session._restore(a_launch(tmp_path))
    assert ended.value.code == ExitCode.STORAGE
