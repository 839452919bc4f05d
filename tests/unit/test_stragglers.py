"""Who is slow: the rank that works longest on its steps, in round after round; an even gang names nobody."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mend.heartbeats import AgentState, Heartbeat, RankReport
from mend.learnt import Pace
from mend.noted import newly_slow
from mend.status import RunStatus, Straggler
from mend.stragglers import ROUND_STEPS, Paces, stragglers

SLOW = 1.3


def paces_of(*ranks: Sequence[float]) -> tuple[Pace, ...]:
    """Ranks with their work in each round, two to a worker."""
    return tuple(Pace(rank=n, worker=n // 2, seconds=tuple(each)) for n, each in enumerate(ranks))


def named(*ranks: Sequence[float], known: tuple[Straggler, ...] = ()) -> dict[int, float]:
    """Who is said to be slow, with the factor."""
    return {each.rank: each.factor for each in stragglers(paces_of(*ranks), SLOW, known, 9.0)}


A_SLOW_ONE = Straggler(rank=1, worker=0, factor=1.5, work_seconds=0.3, began_at=1.0)


def a_beat(steps: int, waited: float, *, attempt: int = 1, pid: int = 7) -> Heartbeat:
    """A rank whose steps take half a second each, of which it waited so much in each."""
    rank = RankReport(rank=3, pid=pid, steps_done=steps, stepped_seconds=0.5 * steps, waited_seconds=waited * steps)
    return Heartbeat(attempt=attempt, worker=1, agent_id="a", state=AgentState.RUNNING, sequence=steps, ranks=(rank,))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([(0.2, 0.2, 0.2)] * 4, {}),
        ([(0.2, 0.2, 0.2), (0.3, 0.3, 0.3)], {1: 1.5}),
        ([(0.2, 0.2, 0.2), (0.3, 0.3, 0.2)], {}),  # in all rounds, or not at all
        ([(0.2, 0.2, 0.2), (0.3, 0.3)], {}),  # too few rounds
        ([(0.2, 0.2, 0.2), (0.3, 0.3, 0.3), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2), (0.2, 0.2, 0.2)], {1: 1.5, 2: 2.0}),
        ([(0.3, 0.3, 0.3)], {}),  # nobody to compare with
        ([(0.0, 0.0, 0.0), (0.0009, 0.0009, 0.0009)], {}),  # all noise
    ],
)
def test_a_rank_is_slow_when_every_round_says_so(ranks: list[tuple[float, ...]], expected: dict[int, float]) -> None:
    """Compared with the median of the others, so that one slow rank does not hide another."""
    assert named(*ranks) == expected


@pytest.mark.parametrize(("work", "stays"), [(0.24, True), (0.22, False)])
def test_one_at_the_edge_does_not_come_and_go(work: float, stays: bool) -> None:
    """A known straggler stays one, since when it was, until it has come half the way back."""
    assert named((0.2,) * 3, (work,) * 3) == {}
    found = stragglers(paces_of((0.2,) * 3, (work,) * 3), SLOW, (A_SLOW_ONE,), 9.0)
    assert [each.began_at for each in found] == ([A_SLOW_ONE.began_at] if stays else [])


def test_a_round_is_the_work_of_its_steps() -> None:
    """Steps less waits, by the step; a round is over with the first heartbeat that brings enough steps."""
    paces = Paces(attempt=1)
    for steps in range(1, 3 * ROUND_STEPS, 4):
        paces.add(a_beat(steps, waited=0.2))
    (pace,) = paces.paces()
    assert (pace.rank, pace.worker) == (3, 1)
    assert pace.seconds == pytest.approx((0.3, 0.3))


def test_other_processes_and_attempts_begin_anew() -> None:
    """Counts of one process say nothing about another's."""
    paces = Paces(attempt=1)
    paces.add(a_beat(50, waited=0.2))
    paces.add(a_beat(60, waited=0.2, attempt=2))
    paces.add(a_beat(60, waited=0.2, pid=8))
    assert paces.paces() == ()


def test_a_rank_that_does_not_measure_is_not_judged() -> None:
    """A loop without gradients, or on a device whose waits the host cannot see."""
    paces = Paces(attempt=1)
    for steps in (1, 20, 40, 60):
        paces.add(a_beat(steps, waited=0.0))
    assert paces.paces() == ()


def test_an_episode_is_one_event() -> None:
    """It is told when a rank becomes slow, with who, where and how much, and not again while it stays so."""
    before, after = RunStatus(attempt=3), RunStatus(attempt=3, stragglers=(A_SLOW_ONE,))
    (event,) = newly_slow(before, after)
    assert (event.type, event.reason) == ("Warning", "RankSlow")
    assert "rank 1 on worker 0 works 1.50 times as long" in event.message
    assert newly_slow(after, after) == ()
