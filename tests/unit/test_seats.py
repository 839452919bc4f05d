"""Who sits where: the ranks of a worker that is there never move, and a spare sits on one place at the most."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from mend.heartbeats import AgentState, Heartbeat
from mend.incidents import Strike
from mend.observation import AgentView, Observation, PodPhase, WorkerPod
from mend.presence import places
from mend.seats import seats
from mend.status import RunStatus
from world import a_spec

SPEC = a_spec(3, 1, spares=2)
NOW = 1000.0


def an_agent(worker: int, *, silent: float = 0.1, standbys: int = 1) -> AgentView:
    """A connected agent without ranks."""
    beat = Heartbeat(
        attempt=1,
        worker=worker,
        agent_id="a",
        state=AgentState.IDLE,
        sequence=1,
        store_port=7,
        standbys_ready=standbys,
    )
    return AgentView(worker=worker, pod_uid=f"u{worker}", connected=True, silent_seconds=silent, heartbeat=beat)


def a_pod(worker: int, **more: object) -> WorkerPod:
    """A pod that runs on a node of its own."""
    return WorkerPod(
        index=worker, name=f"p{worker}", uid=f"u{worker}", phase=PodPhase.RUNNING, node=f"node-{worker}", **more
    )


def a_run(*held: int) -> Observation:
    """Five workers, all well; `held` are the places as of the last launch."""
    return Observation(
        name="clio",
        namespace="team",
        uid="u",
        generation=1,
        created_at=0.0,
        status=RunStatus(attempt=2, places=held),
        pods=tuple(a_pod(n) for n in range(5)),
        agents=tuple(an_agent(n) for n in range(5)),
    )


def without(seen: Observation, *workers: int) -> Observation:
    """With no pod for these workers."""
    return replace(seen, pods=tuple(each for each in seen.pods if each.index not in workers))


@pytest.mark.parametrize(
    ("held", "gone", "seated"),
    [
        ((), (), (0, 1, 2)),
        ((), (1,), (0, 3, 2)),
        ((), (0, 2), (3, 1, 4)),
        ((), (0, 1, 2), (3, 4, 2)),
        ((0, 3, 2), (), (0, 3, 2)),
        ((0, 3, 2), (3,), (0, 1, 2)),
        ((), (3,), (0, 1, 2)),
    ],
    ids=[
        "all there",
        "one gone",
        "two gone",
        "more gone than spares",
        "as last",
        "the former spare gone",
        "a spare gone",
    ],
)
def test_only_the_place_of_who_is_gone_changes_hands(
    held: tuple[int, ...], gone: tuple[int, ...], seated: tuple[int, ...]
) -> None:
    """Spares take the places of those that are gone, in order; nobody else moves."""
    assert seats(SPEC, without(a_run(*held), *gone), NOW) == seated


def test_the_silent_the_going_and_the_ended_are_gone_too() -> None:
    """A place is vacant as soon as nobody could be launched there."""
    for pod in (a_pod(1, deleting=True), replace(a_pod(1), phase=PodPhase.FAILED)):
        seen = replace(without(a_run(), 1), pods=(*without(a_run(), 1).pods, pod))
        assert seats(SPEC, seen, NOW) == (0, 3, 2)
    silent = tuple(an_agent(n, silent=5.0 if n == 1 else 0.1) for n in range(5))
    assert seats(SPEC, replace(a_run(), agents=silent), NOW) == (0, 3, 2)


def test_who_is_not_heard_yet_by_a_new_controller_keeps_the_place() -> None:
    """For the first heartbeats of a controller's life silence is no news."""
    fresh = tuple(
        replace(each, heartbeat=None, connected=False, silent_seconds=0.0) if each.worker == 1 else each
        for each in a_run().agents
    )
    assert seats(SPEC, replace(a_run(), agents=fresh), NOW) == (0, 1, 2)


def test_the_warmest_spare_is_taken() -> None:
    """One whose standbys are ready before one that still starts them."""
    agents = tuple(an_agent(n, standbys=0 if n == 3 else 1) for n in range(5))
    assert seats(SPEC, without(replace(a_run(), agents=agents), 1), NOW) == (0, 4, 2)


def test_a_warm_spare_goes_before_a_new_pod() -> None:
    """A pod that was just made for this attempt has yet to warm up; where all are new, nobody moves."""
    seen = without(a_run(), 1)
    assert seats(SPEC, replace(seen, pods=(*seen.pods, a_pod(1, attempt=2))), NOW) == (0, 3, 2)
    assert seats(SPEC, replace(a_run(), pods=tuple(a_pod(n, attempt=2) for n in range(5))), NOW) == (0, 1, 2)


@pytest.mark.parametrize("ill", [{"node_ready": False}, {"node_problems": ("condition KernelDeadlock",)}])
def test_no_spare_is_taken_from_an_ill_node(ill: dict[str, object]) -> None:
    """It would be the next to go."""
    seen = without(a_run(), 1, 3)
    assert seats(SPEC, replace(seen, pods=(*seen.pods, a_pod(3, **ill))), NOW) == (0, 4, 2)


def test_no_spare_is_taken_from_an_excluded_node() -> None:
    """Strikes beyond the limit keep it idle."""
    strike = Strike(id="x", node="node-3", run="r", reason="", struck_at=0.0, expires_at=9e9, decisive=True)
    assert seats(SPEC, replace(without(a_run(), 1), strikes=(strike,)), NOW) == (0, 4, 2)


@pytest.mark.parametrize(
    ("workers", "spares", "held", "now"),
    [(3, 2, (), (0, 1, 2)), (3, 0, (0, 3, 2), (0, 2, 1)), (2, 1, (0, 3, 2), (0, 2)), (4, 1, (0, 3, 2), (0, 3, 2, 1))],
)
def test_places_follow_the_spec(workers: int, spares: int, held: tuple[int, ...], now: tuple[int, ...]) -> None:
    """Those who may stay keep their order, the rest is filled up with the lowest numbers."""
    spec = a_spec(workers, 1, spares=spares)
    assert places(spec, RunStatus(places=held)) == now
