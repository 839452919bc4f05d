"""A run that is deleted and made anew under its name: what the old one has left does no harm."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mend.actions import CreateWorker
from mend.decide import decide
from mend.listing import StoredCheckpoint, StoreView
from mend.observation import Observation
from mend.states import CheckpointRef
from world import EPOCH, World, a_spec


def stored(step: int, attempt: int, uid: str = "old-uid") -> StoredCheckpoint:
    """Made by the run that had this name before."""
    uri = f"s3://bucket/clio/step-{step:012d}/{attempt:06d}-{uid}"
    return StoredCheckpoint(ref=CheckpointRef(uri=uri, step=step, attempt=attempt), run_uid=uid)


def seen_by(world: World) -> Observation:
    """What the controller sees."""
    assert world.controller is not None
    return world.observe(world.controller)


def test_a_run_begins_once_the_pods_of_the_one_before_are_gone() -> None:
    """They may yet save, and hold the nodes; but nobody waits for them for ever."""
    spec = a_spec()
    listed = StoreView(listed=True, checkpoints=(stored(9, 1),))
    waiting = replace(seen_by(World(spec)), store=listed, predecessors=("clio-0-a1",))
    said = decide(spec, waiting, EPOCH + 1.0)
    assert (said.status.attempt, said.actions) == (0, ())
    assert "clio-0-a1" in said.reason
    assert said.wake_after is not None
    for seen, now in ((replace(waiting, predecessors=()), 1.0), (waiting, 100.0)):
        said = decide(spec, seen, EPOCH + now)
        assert said.status.attempt == 2
        assert sum(isinstance(action, CreateWorker) for action in said.actions) == 2


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_late_commit_of_the_run_before_is_not_restored(late: int) -> None:
    """Under whatever number it comes after the launch, no recovery ever starts from it."""
    world = World(a_spec(), steps=40)
    world.bucket.commit(stored(9, 1))
    world.until_step(15)
    assert world.status.attempt == 2
    world.bucket.commit(stored(35, late))
    world.harm_rank(1, "kill")
    world.until_end()
    assert [each.step for each in world.status.restore if each.step == 35] == []
    assert world.restored_wrongly == []


def test_a_number_that_the_run_before_has_used_meanwhile_is_left_to_it() -> None:
    """Before its launch the attempt moves above it, so that numbers on one lineage never repeat."""
    world = World(a_spec(), steps=40)
    world.bucket.commit(stored(9, 1))
    world.until(lambda world: world.status.attempt == 2)
    world.bucket.commit(stored(12, 2))
    world.until_training()
    assert world.status.attempt == 3
    assert [(link.attempt, link.step) for link in world.status.lineage] == [(2, 12)]
