"""A spec that is edited into one that cannot be run: the run is looked after by the one before."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from mend.actions import EmitEvent
from mend.decide import decide
from mend.incidents import IncidentKind
from mend.noted import accepted_spec
from mend.observation import Observation
from mend.status import RunPhase, RunStatus
from world import World, a_spec

PROBLEMS = ("spec.checkpoint.keepLast: got 1; expected a whole number of at least 2",)


def seen_by(world: World) -> Observation:
    """What the controller sees."""
    assert world.controller is not None
    return world.observe(world.controller)


def test_the_spec_that_is_run_is_kept_in_the_status() -> None:
    """It comes back whole, also through the custom resource; there is none before a first valid one."""
    world = World(a_spec(3, 2, minimum=1)).until_training()
    assert accepted_spec(world.status) == world.spec
    assert accepted_spec(RunStatus()) is None
    assert accepted_spec(RunStatus(accepted_spec='{"of":"another mend"}')) is None
    edited = replace(world.spec, ttl_seconds_after_finished=7)
    world.edit(edited)
    world.run(1.0)
    assert accepted_spec(world.status) == edited


def test_supervision_goes_on_while_the_new_spec_is_spoilt() -> None:
    """A crash is recovered from by the accepted spec; Accepted=False and one event say why the new one is not used."""
    world = World(a_spec()).until_step(15)
    world.harm_rank(1, "kill")
    world.run(1.0)
    seen = seen_by(world)
    crashed = next(each for each, said in world.decisions if said.status.incidents)
    spoilt = replace(crashed, spec_problems=PROBLEMS, generation=9)
    kept = accepted_spec(spoilt.status)
    assert kept is not None
    said = decide(kept, spoilt, world.now)
    assert said.status.incidents[-1].kind is IncidentKind.CRASHED
    assert said.status.phase is RunPhase.RECOVERING
    accepted = next(each for each in said.status.conditions if each.type == "Accepted")
    assert (accepted.status, accepted.reason) == ("False", "InvalidSpec")
    assert PROBLEMS[0] in accepted.message
    events = [action.reason for action in said.actions if isinstance(action, EmitEvent)]
    assert events.count("InvalidSpec") == 1
    again = decide(kept, replace(spoilt, status=said.status), world.now)
    assert "InvalidSpec" not in [action.reason for action in again.actions if isinstance(action, EmitEvent)]
    assert accepted_spec(again.status) == kept
    mended = decide(world.spec, replace(seen, status=again.status), world.now)
    assert next(each for each in mended.status.conditions if each.type == "Accepted").status == "True"


def test_what_was_decided_on_a_spoilt_spec_can_be_replayed() -> None:
    """The observation holds the problems, so that a journal's line is complete."""
    seen = replace(seen_by(World(a_spec())), spec_problems=PROBLEMS)
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Observation) == seen
