"""A store without conditional writes is trained on, but not without a word."""

from __future__ import annotations

from msgspec.structs import replace

from mend.actions import EmitEvent
from mend.decide import decide
from mend.listing import StoreView
from world import World, a_spec

CAUTION = "the store ignores conditional writes"


def test_a_store_without_conditional_writes_is_said_so_once() -> None:
    """The condition stays for as long as it is so, the event comes once; training starts nevertheless."""
    world = World(a_spec()).until(lambda world: world.status.participants != ())
    launching = next(seen for seen, said in world.decisions if said.status.participants)
    store = replace(launching.store, caution=CAUTION)
    assert isinstance(store, StoreView)
    first = decide(world.spec, replace(launching, store=store), world.now)
    condition = next(each for each in first.status.conditions if each.type == "ConditionalWrites")
    assert (condition.status, condition.reason, condition.message) == ("False", "NoConditionalWrites", CAUTION)
    ready = next(each for each in first.status.conditions if each.type == "StorageReady")
    assert ready.status == "True"
    known = replace(launching.status, conditions=first.status.conditions)
    again = decide(world.spec, replace(launching, store=store, status=known), world.now)
    better = decide(world.spec, replace(launching, status=known), world.now)
    told = [
        [action.reason for action in said.actions if isinstance(action, EmitEvent)] for said in (first, again, better)
    ]
    assert told == [["NoConditionalWrites"], [], []]
    assert all(each.type != "ConditionalWrites" for each in better.status.conditions)
