"""A gang that stands still is noticed soon and killed late, unless the kernel says that it cannot go on."""

from __future__ import annotations

from mend.watchdog import STEPS_OF_PATIENCE
from simulated_gang import STEP_SECONDS
from world import World, a_spec


def a_world() -> World:
    """Two workers whose steps take half a second, with something learnt."""
    return World(a_spec(2, 2), steps=400).until_training().until_step(20)


def has_incident(world: World) -> bool:
    """Whether one is open."""
    return world.status.open_incident is not None


def pause(world: World, seconds: float) -> None:
    """All ranks wait in the same collective, and then it goes on."""
    world.break_network()
    world.run(seconds)
    world.repair_network()
    world.run(2.0)


def test_without_proof_nobody_is_killed_before_patience_has_run_out() -> None:
    """The incident is there within two steps and a heartbeat; the attempt that it is about trains on for a pause."""
    world = a_world()
    attempt = world.status.attempt
    world.break_network()
    broken = world.now
    world.until(has_incident, within=1.5)
    noticed = world.now
    world.until(lambda world: world.status.attempt > attempt, within=20.0)
    assert noticed - broken <= 1.5
    assert world.now - broken >= STEPS_OF_PATIENCE * STEP_SECONDS - STEP_SECONDS
    assert world.status.incidents[0].detected_at - noticed < 0.2


def test_a_stopped_rank_is_acted_on_at_once() -> None:
    """Its process does not go on by itself, so there is nothing to be patient for."""
    world = a_world()
    attempt = world.status.attempt
    world.harm_rank(1, "stop")
    world.until(has_incident, within=1.5)
    noticed = world.now
    world.until(lambda world: world.status.attempt > attempt, within=20.0)
    assert world.now - noticed < 2.0


def test_of_pauses_only_the_newest_is_kept() -> None:
    """They cost nothing, no budget either, and never push out an incident that did."""
    world = a_world()
    world.harm_rank(2, "kill")
    world.until(lambda world: world.status.attempt == 2).until_training().run(6.0)
    for _ in range(3):
        pause(world, 2.0)
    crash, newest = world.status.incidents
    assert crash.tier is not None
    assert (newest.tier, newest.is_open, newest.steps_lost) == (None, False, 0)
    assert (world.status.attempt, world.status.recoveries) == (2, 1)
