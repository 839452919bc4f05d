"""When a rank with a buddy takes snapshots: for memory alone, only once the one before is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mend.orders import CheckpointPlan
from mend.reports import Report, Skipped, Staged
from mend_trainer.checkpoint import Checkpointer
from mend_trainer.checkpoint.arena import Arena


class Unheard:
    """A link to a saver that has not looked yet."""

    tells_agent = True

    def wake(self, staged: Staged) -> None:
        """It does not hear."""

    def revive(self) -> None:
        """Nor is there one."""

    def close(self) -> None:
        """So nothing is to be closed."""


@pytest.fixture
def reports() -> list[Report]:
    """What the checkpointer has reported."""
    return []


def a_checkpointer(folder: Path, reports: list[Report], *, has_buddy: bool = True) -> Checkpointer:
    """Of a run of one rank."""
    return Checkpointer(
        CheckpointPlan(uri=f"file://{folder}"),
        run="tests/run",
        run_uid="uid",
        attempt=1,
        report=reports.append,
        arena=Arena.create("own"),
        saver=lambda arena: Unheard(),
        has_buddy=has_buddy,
    )


def save(checkpointer: Checkpointer, step: int, *, owed: bool = False) -> bool:
    """A state of that step."""
    return checkpointer.save(step, step, {"model": {"w": torch.full((8,), float(step))}}, {}, owed=owed)


def test_the_next_snapshot_waits_for_the_copy_of_the_last(tmp_path: Path, reports: list[Report]) -> None:
    """Until the buddy has it, or will not get it, the last stays the last; nothing is reported as skipped."""
    checkpointer = a_checkpointer(tmp_path, reports)
    assert save(checkpointer, 1)
    assert not save(checkpointer, 2)
    (snapshot,) = checkpointer.arena.snapshots()
    snapshot.mark_copied()
    assert save(checkpointer, 3)
    assert [each.header.origin.step for each in checkpointer.arena.snapshots()] == [1, 3]
    assert not any(isinstance(report, Skipped) for report in reports)


def test_a_save_does_not_wait(tmp_path: Path, reports: list[Report]) -> None:
    """What is owed to the store is taken though the copy of the one before is still on its way."""
    checkpointer = a_checkpointer(tmp_path, reports)
    assert save(checkpointer, 1)
    assert save(checkpointer, 2, owed=True)


def test_without_a_buddy_nothing_waits(tmp_path: Path, reports: list[Report]) -> None:
    """A run of one worker takes as many as its interval says."""
    checkpointer = a_checkpointer(tmp_path, reports, has_buddy=False)
    assert all(save(checkpointer, step) for step in range(4))
