"""How a rank learns what came of its saves: of each, whichever is done first and whatever takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mend.orders import CheckpointPlan
from mend.reports import Committed, Report, SaveFailed, Staged
from mend.states import CheckpointRef
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.arena import Arena, Snapshot


class Unheard:
    """A link to a saver whose part the test plays."""

    tells_agent = False

    def wake(self, staged: Staged) -> None:
        """It does not hear."""

    def revive(self) -> None:
        """Nor is there one."""

    def close(self) -> None:
        """So nothing is to be closed."""


class Slow(Mapping[str, Any]):
    """A state during whose listing something happens, as it may while ranks wait for each other."""

    def __init__(self, state: Mapping[str, Any], meanwhile: Callable[[], None]) -> None:
        self._state, self._meanwhile = state, meanwhile

    def __getitem__(self, key: str) -> Any:
        return self._state[key]

    def __len__(self) -> int:
        return len(self._state)

    def __iter__(self) -> Iterator[str]:
        self._meanwhile()
        return iter(self._state)


@pytest.fixture
def reports() -> list[Report]:
    """What the checkpointer has reported."""
    return []


@pytest.fixture
def checkpointer(tmp_path: Path, reports: list[Report]) -> Checkpointer:
    """Of a run of one rank."""
    return Checkpointer(
        CheckpointPlan(uri=f"file://{tmp_path}"),
        run="tests/run",
        run_uid="uid",
        attempt=1,
        report=reports.append,
        arena=Arena.create("own"),
        saver=lambda arena: Unheard(),
    )


def a_state(step: int) -> dict[str, Any]:
    """A state of that step."""
    return {"model": {"w": torch.full((8,), float(step))}}


def save(checkpointer: Checkpointer, step: int, *, owed: bool = True) -> Snapshot:
    """Take the snapshot of that step."""
    assert checkpointer.save(step, step, a_state(step), {}, owed=owed)
    return newest(checkpointer)


def newest(checkpointer: Checkpointer) -> Snapshot:
    """The last that was taken."""
    return checkpointer.arena.snapshots()[-1]


def commit(snapshot: Snapshot) -> None:
    """As the saver would."""
    origin = snapshot.header.origin
    ref = CheckpointRef(uri="file:///x", step=origin.step, attempt=origin.attempt)
    outcome = Committed(checkpoint=ref, stall_seconds=0.0, commit_seconds=0.0, bytes=1)
    snapshot.settle(msgspec.json.encode(outcome))


def fail(snapshot: Snapshot) -> None:
    """As the saver would."""
    snapshot.settle(msgspec.json.encode(SaveFailed(step=snapshot.header.origin.step, error="no store")))


def test_a_save_done_while_ranks_agree_on_the_next_is_heard_of(checkpointer: Checkpointer) -> None:
    """Its place is taken by the next, and what came of it is not lost with it: nothing stays on its way for ever."""
    first = save(checkpointer, 1)
    save(checkpointer, 2, owed=False)
    assert checkpointer.save(3, 3, Slow(a_state(3), lambda: commit(first)), {})
    commit(newest(checkpointer))
    assert not checkpointer.in_flight
    assert checkpointer.wait(0.0)


def test_a_later_save_may_be_done_first(checkpointer: Checkpointer, reports: list[Report]) -> None:
    """Each is heard of when it is done, so that one that waits for its store does not hide those after it."""
    first, second = save(checkpointer, 1), save(checkpointer, 2)
    commit(second)
    commit(save(checkpointer, 3))
    assert checkpointer.in_flight
    commit(first)
    assert checkpointer.wait(0.0)
    assert [report.checkpoint.step for report in reports if isinstance(report, Committed)] == [2, 3, 1]


def test_what_came_of_the_newest_counts(checkpointer: Checkpointer) -> None:
    """An older save that fails at last does not make a failure of a newer one that was committed, nor the reverse."""
    first, second = save(checkpointer, 1), save(checkpointer, 2)
    commit(second)
    assert checkpointer.in_flight
    fail(first)
    assert checkpointer.wait(0.0)
    third, fourth = save(checkpointer, 3), save(checkpointer, 4)
    fail(fourth)
    assert checkpointer.in_flight
    commit(third)
    assert not checkpointer.wait(0.0)
