"""A state in the worker's own memory: what a rank makes of it in one process, with the agent's part played here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mend.environment import ENV_ARENA, ENV_ARENAS, ENV_LAUNCH
from mend.exitcodes import ExitCode
from mend.orders import CheckpointPlan, Launch
from mend.protocol import encode
from mend.states import CheckpointRef
from mend.store import open_store
from mend_trainer.alone import next_attempt
from mend_trainer.checkpoint import Checkpointer, CheckpointsUnreadable
from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.checkpoint.writer import digest_all
from mend_trainer.session import Session
from mend_trainer.slots import region_start
from saver_thread import WorkersSaver

STEPS = 4
DATA_REGION = 4


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


def a_checkpointer(folder: Path, arena: Arena, mark: Callable[[], None] = lambda: None) -> Checkpointer:
    """Of a run of one rank with that arena."""
    return Checkpointer(
        a_plan(folder), run="tests/run", run_uid="uid", attempt=1, report=lambda report: None, arena=arena, mark=mark
    )


def a_snapshot(checkpointer: Checkpointer, state: dict[str, Any]) -> Snapshot:
    """Of step 7, with the digests that its saver would add."""
    assert checkpointer.save(7, 7, state, {}, owed=False)
    (snapshot,) = checkpointer.arena.snapshots()
    snapshot.add_digests(digest_all(snapshot))
    return snapshot


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
    snapshot = a_snapshot(checkpointer, a_state(7.0))
    snapshot.raw(1)[3] ^= 1
    with pytest.raises(CheckpointsUnreadable, match="do not have their digest"):
        checkpointer.restore([in_memory(snapshot)], a_state(0.0))


def test_a_snapshot_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Even if every byte that was read has its digest, since the next ones might have been of another step."""
    arena = Arena.create("own")
    rank = a_checkpointer(tmp_path, arena)
    snapshot = a_snapshot(rank, a_state(7.0))
    replaced = []

    def train_on() -> None:
        replaced.append([rank.save(step, step, a_state(7.0), {}, owed=False) for step in (8, 9)])

    with pytest.raises(CheckpointsUnreadable, match="replaced while it was read"):
        a_checkpointer(tmp_path, arena, mark=train_on).restore([in_memory(snapshot)], a_state(0.0))
    assert replaced == [[True, True]]


def test_an_arena_that_ends_too_early_is_told_by_its_place(tmp_path: Path) -> None:
    """Memory that is gone in the middle of a snapshot is an error with the place, and no signal that ends the rank."""
    arena = Arena.create("own")
    checkpointer = a_checkpointer(tmp_path, arena)
    snapshot = a_snapshot(checkpointer, a_state(7.0))
    os.ftruncate(arena.descriptor, region_start(snapshot.slot, DATA_REGION) + snapshot.starts[1] + 20)
    with pytest.raises(CheckpointsUnreadable, match=r"32 bytes at byte 64 of this worker's memory: .* ends 12 bytes"):
        checkpointer.restore([in_memory(snapshot)], a_state(0.0))


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    """Whatever their type, shape and place in memory; those that do not lie in one piece by way of a mapping."""

    def state_of(seed: int) -> dict[str, Any]:
        drawn = torch.Generator().manual_seed(seed)
        return {
            "model": {
                "large": torch.randn(700_001, generator=drawn),
                "half": torch.randn(33, 5, generator=drawn).to(torch.bfloat16),
                "turned": torch.randn(70, 30, generator=drawn).t(),
                "complex": torch.randn(9, generator=drawn, dtype=torch.complex64),
                "truth": torch.randn(17, generator=drawn) > 0,
                "scalar": torch.randn((), generator=drawn),
                "empty": torch.empty(0, 3),
                "trained": torch.nn.Parameter(torch.randn(3, generator=drawn)),
            }
        }

    checkpointer = a_checkpointer(tmp_path, Arena.create("own"))
    snapshot = a_snapshot(checkpointer, state_of(1))
    state = state_of(2)
    assert checkpointer.restore([in_memory(snapshot)], state) is not None
    saved = state_of(1)["model"]
    assert [name for name, tensor in state["model"].items() if not torch.equal(tensor, saved[name])] == []


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
