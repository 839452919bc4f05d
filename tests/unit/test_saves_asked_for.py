"""Saves that a person, or an automatic interval, asks for, in the simulated cluster."""

from __future__ import annotations

from msgspec.structs import replace

from mend.actions import EmitEvent, SendSaveNow, SendStop
from mend.decide import decide
from mend.heartbeats import SaveReport
from mend.observation import Observation
from mend.saving import COMMIT_SECONDS, saving
from mend.spec import Spec
from mend.status import CheckpointStatus, RunPhase, SaveWish, WishState
from world import World, a_spec


def auto(least: str = "3s", most: str = "1h") -> Spec:
    """A run that leaves the interval to mend."""
    checkpoint = {"uri": "s3://bucket/clio", "interval": "auto", "minInterval": least, "maxInterval": most}
    return a_spec(checkpoint=checkpoint)


def orders(world: World) -> list[SendSaveNow]:
    """All orders to save that were decided on."""
    return [action for _, said in world.decisions for action in said.actions if isinstance(action, SendSaveNow)]


def wish(world: World) -> SaveWish:
    """The last one."""
    assert world.status.wish is not None
    return world.status.wish


def test_each_value_of_the_annotation_is_one_save() -> None:
    """It is asked for once, through the worker of rank 0, and answered by a checkpoint of its step or a later one."""
    world = World(a_spec(), steps=10_000, save_every=100_000).until_step(12)
    world.save_now = "first"
    world.until(lambda world: world.status.wish is not None and world.status.wish.state is WishState.ANSWERED)
    assert wish(world).id == "first"
    assert world.status.checkpoint is not None
    assert world.status.checkpoint.step >= wish(world).step >= 12
    assert [each.worker for each in orders(world)] == [0]
    world.until_step(40)
    assert len(orders(world)) == 1
    world.save_now = "second"
    world.until(lambda world: wish(world).id == "second" and wish(world).state is WishState.ANSWERED)
    assert len(orders(world)) == 2


def test_an_annotation_before_the_run_trains_is_kept_until_it_does() -> None:
    """A wish is a fact in the resource, and no call that can be missed."""
    world = World(a_spec(), steps=10_000, save_every=100_000)
    world.save_now = "early"
    world.until(lambda world: world.status.wish is not None and world.status.wish.state is WishState.ANSWERED)
    assert world.status.phase is RunPhase.RUNNING


def test_a_wish_survives_the_controller() -> None:
    """Killed before or after it wrote the wish down, the next one sees to it, and no order is given without end."""
    for point in ("status", "action"):
        world = World(a_spec(), steps=10_000, save_every=100_000).until_step(5)
        world.save_now = "ask"
        world.crash_point = point
        world.until(lambda world: world.status.wish is not None and world.status.wish.state is WishState.ANSWERED)
        assert len(orders(world)) <= 2


def test_a_wish_goes_on_in_the_next_attempt() -> None:
    """Also if that one starts further back than where the save was asked for."""
    world = World(a_spec(), steps=10_000, save_every=100_000).until_step(30)
    world.bucket.available = False
    world.save_now = "ask"
    world.until(lambda world: len(orders(world)) == 1)
    world.harm_rank(1, "kill")
    world.until(lambda world: world.status.attempt == 2)
    world.bucket.available = True
    world.until(lambda world: wish(world).state is WishState.ANSWERED)
    assert wish(world).attempt == 2
    assert world.status.checkpoint is not None
    assert world.status.checkpoint.attempt == 2


def test_a_wish_that_nothing_comes_of_is_given_up_and_told() -> None:
    """After three orders, with an event; training goes on."""
    world = World(a_spec(), steps=100_000, save_every=1_000_000).until_step(5)
    world.bucket.available = False
    world.save_now = "ask"
    world.until(lambda world: world.status.wish is not None and world.status.wish.state is WishState.GIVEN_UP)
    assert len(orders(world)) == 3
    events = [a.reason for _, said in world.decisions for a in said.actions if isinstance(a, EmitEvent)]
    assert events.count("SaveNotMade") == 1
    assert world.status.phase is RunPhase.RUNNING


def told_save(seen: Observation, save: SaveReport) -> Observation:
    """The same, where rank 0's agent tells this of saving."""
    agents = tuple(
        replace(each, heartbeat=replace(each.heartbeat, save=save)) if each.worker == 0 and each.heartbeat else each
        for each in seen.agents
    )
    return replace(seen, agents=agents)


def test_a_save_that_is_on_its_way_is_not_ordered_again() -> None:
    """A large state takes minutes to be committed: while nothing is known to have failed, it is awaited."""
    world = World(a_spec(), steps=10_000, save_every=100_000).until_step(12)
    assert world.controller is not None
    seen = world.observe(world.controller)
    for seconds, begun, failures, times in (
        (31.0, -1, 0, 2),  # nothing came of the order
        (31.0, 11, 0, 2),  # what was begun before it does not answer it
        (31.0, 13, 0, 1),
        (31.0, 13, 1, 2),
        (COMMIT_SECONDS - 1, 13, 0, 1),
        (COMMIT_SECONDS + 1, 13, 0, 2),
    ):
        wish = SaveWish(id="ask", step=12, asked_at=world.now, attempt=1, told_at=world.now, times=1)
        status = replace(seen.status, wish=wish)
        known = told_save(replace(seen, save_now="ask", status=status), SaveReport(begun_step=begun, failures=failures))
        after, orders = saving(world.spec.checkpoint, known, status, world.now + seconds)
        assert after.wish is not None
        assert (after.wish.times, len(orders)) == (times, times - 1)


def test_an_interval_begins_with_the_last_order() -> None:
    """A wish that was given up is not followed by the next at once, however often it was told."""
    spec = auto(least="60s")
    world = World(spec, steps=10_000, save_every=100_000).until_training()
    assert world.controller is not None
    seen, told = world.observe(world.controller), world.now + 70.0
    wish = SaveWish(
        id="", step=1, asked_at=world.now, by_interval=True, state=WishState.GIVEN_UP, attempt=1, told_at=told, times=3
    )
    status = replace(seen.status, wish=wish)
    known = replace(seen, status=status)
    assert saving(spec.checkpoint, known, status, told + 59.0)[1] == []
    assert len(saving(spec.checkpoint, known, status, told + 61.0)[1]) == 1


def test_a_clock_that_was_set_back_holds_up_no_order() -> None:
    """Neither the next order of a wish, nor the sweeping of leftovers, waits for the clock to catch up."""
    world = World(a_spec(), steps=10_000, save_every=100_000).until_step(12)
    assert world.controller is not None
    seen = world.observe(world.controller)
    ahead = world.now + 7200.0
    wish = SaveWish(id="ask", step=12, asked_at=ahead, attempt=1, told_at=ahead, times=1)
    known = replace(seen, save_now="ask", status=replace(seen.status, wish=wish, swept_at=ahead))
    said = decide(world.spec, known, world.now).status
    assert said.wish is not None
    assert (said.wish.asked_at, said.wish.told_at, said.swept_at) == (world.now, world.now, world.now)


def test_what_is_saved_already_is_not_saved_again() -> None:
    """A wish at a step that has just been committed is answered without an order."""
    world = World(a_spec(), steps=10_000, save_every=100_000).until_step(12)
    assert world.controller is not None
    seen = world.observe(world.controller)
    for saved, state in ((10**6, WishState.ANSWERED), (1, WishState.OPEN)):
        checkpoint = CheckpointStatus(step=saved, attempt=1, uri="s3://bucket/clio/x", committed_at=world.now)
        known = replace(seen, save_now="ask", status=replace(seen.status, checkpoint=checkpoint))
        said = decide(world.spec, known, world.now)
        assert said.status.wish is not None
        assert said.status.wish.state is state
        assert [isinstance(action, SendSaveNow) for action in said.actions] == [True] * (state is WishState.OPEN)


def test_an_automatic_interval_asks_when_it_is_over() -> None:
    """Save after save, about as far apart as the bound allows, since saving costs nothing here."""
    world = World(auto(), steps=100_000, save_every=1_000_000).until_training()
    world.until(lambda world: len(orders(world)) >= 4, within=900.0)
    assert world.status.interval is not None
    assert world.status.interval.seconds == 3.0
    assert world.status.interval.cost_seconds == 0.0
    assert all(stop.grace_seconds == 0 for _, s in world.decisions for stop in s.actions if isinstance(stop, SendStop))
    world.save_now = "by hand"
    world.until(lambda world: wish(world).id == "by hand" and wish(world).state is WishState.ANSWERED)


def test_retention_waits_while_the_loss_may_be_a_spike() -> None:
    """Else the saves that go on meanwhile would push out the one that the run has to go back to."""
    rule = {"rollBack": True, "window": 16, "points": 12}
    checkpoint = {"uri": "s3://bucket/clio", "keepLast": 2}
    world = World(a_spec(health={"lossSpike": rule}, checkpoint=checkpoint), steps=10_000, save_every=4).until_step(40)
    world.raise_loss()
    world.until(lambda world: world.status.attempt == 2 and world.status.restored_step is not None)
    began = world.status.restored_step
    assert began is not None
    assert 30 < began <= 41
    world.until_step(60)
    refs = [each.ref for each in world.bucket.checkpoints.values()]
    assert [ref.step for ref in refs if ref.attempt == 1 and ref.step <= began] == [began]  # what was put off is done


def test_ranks_are_told_an_interval_that_they_keep_without_a_controller() -> None:
    """The launch carries what the interval has come to, or the first one while nothing was measured."""
    world = World(auto(most="5m"), steps=100_000, save_every=1_000_000).until_training()
    (plan,) = {launch.checkpoint for _, launch in world.launches[1]}
    assert plan is not None
    assert plan.interval_seconds == 300.0
    world.until(lambda world: world.status.interval is not None and world.status.interval.cost_seconds is not None, 900)
    world.harm_rank(1, "kill")
    world.until(lambda world: 2 in world.launches)
    (plan,) = {launch.checkpoint for _, launch in world.launches[2]}
    assert plan is not None
    assert plan.interval_seconds == 3.0
