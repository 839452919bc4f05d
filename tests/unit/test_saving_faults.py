"""The plan of the checkpoint campaign: decided by its seed, fit for its ground, and without a kind left to chance."""

from __future__ import annotations

from checkpoint_campaign import COUNT

import saving_injection
from saving_faults import BLOCK, KINDS, REQUESTS_OF_A_SAVE, Ground, Moment, When, plans


def test_the_same_seed_gives_the_same_plan() -> None:
    """A campaign can be replayed, resumed and extended; another seed gives another."""
    assert plans(1, 130) == plans(1, 400)[:130]
    assert plans(1, 130) != plans(2, 130)
    assert [plan.number for plan in plans(1, 130)] == list(range(130))


def test_each_fault_fits_its_ground() -> None:
    """What kills or fills the store is planned only where that can be done; blocks keep their gang."""
    for plan in plans(3, 2000):
        assert Ground(plan.ground) in KINDS[plan.kind].grounds
        assert plan.victim < plan.workers * plan.ranks
        assert not (plan.in_memory and KINDS[plan.kind].from_store)
    gangs = [{(p.ground, p.workers, p.ranks) for p in plans(3, 400)[n : n + BLOCK]} for n in range(0, 400, BLOCK)]
    assert all(len(each) == 1 for each in gangs)
    assert set.union(*gangs) == {("ministack", 1, 2), ("rclone", 1, 2), ("ministack", 2, 1), ("rclone", 2, 1)}


def test_somebodys_store_is_not_harmed() -> None:
    """With an endpoint of the user's nothing of it is killed, paused or filled."""
    done = {plan.kind for plan in plans(1, 500, (Ground.GIVEN,))}
    assert not done & {"kill-store", "kill-store-restoring", "pause-store", "fill-disk"}
    assert {"kill-rank", "kill-saver", "flip-shard"} <= done


def test_the_default_length_holds_a_thousand_kills_and_every_kind() -> None:
    """It is what the figure asks for; some cannot be done everywhere."""
    done = [plan.kind for plan in plans(1, COUNT)]
    assert sum(KINDS[kind].is_kill for kind in done) >= 1000
    assert min(done.count(kind) for kind in KINDS) >= 3


def test_moments_are_drawn_over_the_whole_life_of_a_save() -> None:
    """Every request of a save, before and after its answer, is some kill's moment, and so are clock and copy."""
    kills = [plan for plan in plans(1, COUNT) if KINDS[plan.kind].when is When.SAVING and KINDS[plan.kind].is_kill]
    by_request = [plan for plan in kills if plan.moment is Moment.REQUEST]
    assert {(plan.request, plan.after) for plan in by_request} == {
        (number, after) for number in range(REQUESTS_OF_A_SAVE) for after in (False, True)
    }
    assert all(sum(plan.moment is moment for plan in kills) > 100 for moment in Moment)


def test_a_restore_from_memory_does_not_wait_for_requests_to_the_store() -> None:
    """None would come."""
    restoring = [plan for plan in plans(1, COUNT) if KINDS[plan.kind].when is When.RESTORING]
    assert not [plan for plan in restoring if plan.in_memory and plan.moment is Moment.REQUEST]
    assert [plan for plan in restoring if plan.moment is Moment.REQUEST]


def test_everything_that_is_planned_can_be_done() -> None:
    """There is a hand for each kind, and no other."""
    assert saving_injection.DO.keys() == KINDS.keys()
