"""A silent worker is shown as suspect after three heartbeats, and nothing is done about it before there is more."""

from __future__ import annotations

import pytest

from world import World, a_spec

HEARTBEAT_SECONDS = 0.5


def a_world() -> World:
    """Two workers that train, with a heartbeat every half second."""
    return World(a_spec(2, 1, health={"heartbeatInterval": "500ms"}), steps=400).until_training().until_step(20)


def is_suspect(world: World) -> bool:
    """Whether the status shows a suspect."""
    return any(each.type == "Suspect" and each.status == "True" for each in world.status.conditions)


def test_three_silent_intervals_raise_a_suspect() -> None:
    """Not before, and within one heartbeat after; the message names the worker."""
    world = a_world()
    world.cut_streams(4.0, 1)
    began = world.now
    world.until(is_suspect, within=4.0)
    assert 3 * HEARTBEAT_SECONDS - HEARTBEAT_SECONDS <= world.now - began <= 4 * HEARTBEAT_SECONDS
    (suspect,) = (each for each in world.status.conditions if each.type == "Suspect")
    assert suspect.message == "no heartbeat from worker 1"


@pytest.mark.parametrize("silence", [0.5, 1.0])
def test_shorter_silences_are_not_shown(silence: float) -> None:
    """A heartbeat may be late, and the next one, too."""
    world = a_world()
    world.cut_streams(silence, 1)
    for _ in range(30):
        assert not is_suspect(world.run(0.1))


def test_a_suspect_costs_nothing_while_the_others_step_on() -> None:
    """The attempt goes on, no incident is noted, and the condition goes once the worker was heard for a while."""
    world = a_world()
    attempt = world.status.attempt
    world.cut_streams(4.0, 1)
    world.until(is_suspect, within=4.0).until(lambda world: not is_suspect(world), within=30.0)
    assert (world.status.attempt, world.status.incidents) == (attempt, ())
