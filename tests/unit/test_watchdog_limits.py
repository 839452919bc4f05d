"""How long a rank may go without progress: learnt for steps, given for the rest, and the whole gang must be late."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mend.heard import StepSamples
from mend.heartbeats import Phase, RankExit, RankReport
from mend.learnt import StepTimes
from mend.spec import Limits
from mend.watchdog import (
    MEASURED_RANKS,
    MOST_PAUSE_SECONDS,
    REJOIN_SECONDS,
    RESTART_SECONDS,
    Bounds,
    bounds_for,
    pause_in_force,
    step_bounds,
    until_bounds,
)

LIMITS = Limits(
    start_seconds=100,
    first_step_seconds=200,
    floor_seconds=1.5,
    ceiling_seconds=60,
    pause_seconds=5,
    saving_seconds=300,
    evaluating_seconds=400,
)


def rank(phase: Phase = Phase.STEP, idle: float = 0.0, steps: int = 5, number: int = 0, **more: object) -> RankReport:
    """A rank that has not progressed for `idle` seconds."""
    return RankReport(rank=number, pid=1, phase=phase, progress_seconds=idle, steps_done=steps, **more)


def learnt(lengths: Sequence[float]) -> StepTimes:
    """What the controller keeps of these steps."""
    samples = StepSamples(attempt=1)
    for seconds in lengths:
        samples.learn(seconds)
    return samples.times()


def bounds_after(lengths: Sequence[float]) -> Bounds:
    """What holds after these steps."""
    found = step_bounds(learnt(lengths), LIMITS)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("lengths", "limit", "patience"),
    [
        ([0.5], 5.0, 10.0),  # few samples: ten times the longest
        ([0.5, 2.0, 0.5], 20.0, 25.0),
        ([0.3] * 8, 1.5, 6.5),  # no spread: the floor, then a pause
        ([2.5] * 8, 4.0, 50.0),  # of longer steps too
        ([1.0] * 8, 1.6, 20.0),  # 1.6 medians, and twenty
        ([50.0] * 8, 60.0, 60.0),  # never above the ceiling
        ([1.0] * 12 + [30.0], 1.6, 60.0),  # one long step makes patient, and moves the limit not at all
        ([1.0] * 12 + [3.0] + [1.0] * 12 + [3.0], 1.12 * 3.0, 20.0),  # the second time, it is a habit
        ([1.0] * 10 + [1.0 + 2.0 * 0.6745] * 5, 1.0 + 3.5 * 2.0, 1.0 + 15 * 2.0),  # a wide spread widens both
    ],
)
def test_bounds_of_a_step(lengths: list[float], limit: float, patience: float) -> None:
    """Medians, spreads and peaks, whichever allows most; patience never ends within a pause of the limit."""
    found = bounds_after(lengths)
    assert found.limit == pytest.approx(limit, rel=1e-3)
    assert found.patience == pytest.approx(patience, rel=1e-3)


def test_a_rank_that_does_nothing_is_waited_for_less() -> None:
    """A long step is computed, or read from a disk: whoever sleeps in it is given eight medians, not twenty."""
    times = learnt([1.0] * 8)
    assert step_bounds(times, LIMITS, idle=True) == pytest.approx((1.6, 8.0))


@given(st.integers(1, 100_000))
def test_more_ranks_are_borne_longer(ranks: int) -> None:
    """Up to a minute: of more ranks one is likelier to make a long pause, and their way back costs more."""
    borne = pause_in_force(None, may_rejoin=True, ranks=ranks)
    assert REJOIN_SECONDS <= borne <= pause_in_force(None, may_rejoin=True, ranks=2 * ranks) <= MOST_PAUSE_SECONDS
    assert (borne == REJOIN_SECONDS) is (ranks <= MEASURED_RANKS)


def test_without_steps_there_is_nothing_learnt() -> None:
    """The spec's limit for a first step holds then."""
    assert step_bounds(StepTimes(), LIMITS) is None


def test_few_samples_of_many_fast_steps_are_enough() -> None:
    """Of steps that are shorter than a heartbeat few are sampled; that there were eight of them is what counts."""
    few = (0.3, 0.3, 0.3)
    assert step_bounds(StepTimes(seconds=few, steps=7), LIMITS) == (3.0, 8.0)
    assert step_bounds(StepTimes(seconds=few, steps=8), LIMITS) == (1.5, 6.5)


@given(st.integers(0, 40), st.booleans())
def test_a_pause_is_borne_as_long_as_its_cure_costs_and_twice_as_long_each_time(hangs: int, may_rejoin: bool) -> None:
    """Up to a minute; one that was given holds, however often ranks were killed."""
    borne = pause_in_force(None, may_rejoin=may_rejoin, hangs=hangs)
    first = REJOIN_SECONDS if may_rejoin else RESTART_SECONDS
    assert borne == min(first * 2**hangs, MOST_PAUSE_SECONDS)
    assert pause_in_force(3.0, may_rejoin=may_rejoin, hangs=hangs) == 3.0


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=100))
def test_bounds_stay_between_floor_and_ceiling(lengths: list[float]) -> None:
    """Whatever the steps were like; and nobody is killed before the gang counts as hung."""
    found = bounds_after(lengths)
    assert LIMITS.floor_seconds <= found.limit <= found.patience <= LIMITS.ceiling_seconds


@given(st.lists(st.floats(0.1, 1.2), min_size=8, max_size=64), st.floats(0.1, 1.2))
def test_a_step_twice_as_long_as_ever_never_costs_a_rank(lengths: list[float], last: float) -> None:
    """Patience is longer than twice the longest step that this attempt has seen."""
    assert bounds_after([*lengths, last]).patience > 2 * max(*lengths, last)


@pytest.mark.parametrize(
    ("report", "limit"),
    [
        (rank(Phase.STARTING), 100),
        (rank(Phase.LOADING), 100),
        (rank(Phase.SAVING), 300),
        (rank(Phase.EXITING), 300),
        (rank(Phase.EVALUATING), 400),
        (rank(Phase.STEP, steps=0), 200),  # compiles
        (rank(Phase.DATA), 1.6),
        (rank(Phase.STEP), 1.6),
        (rank(Phase.COLLECTIVE), 1.6),
    ],
)
def test_each_phase_has_its_limit(report: RankReport, limit: float) -> None:
    """Until something was learnt, the spec's limits hold; a step is learnt once the process has made its first."""
    assert bounds_for(report, StepTimes(seconds=(1.0,) * 8), LIMITS).limit == limit


@pytest.mark.parametrize(
    ("longest", "bounds"), [(0.001, (LIMITS.floor_seconds, 6.5)), (5.0, (50.0, 55.0)), (90.0, (300.0, 300.0))]
)
def test_saving_is_learnt_from_its_longest_gap(longest: float, bounds: tuple[float, float]) -> None:
    """Ten times the longest time between two marks, within the floor of all learnt limits and the spec's limit."""
    times = StepTimes(longest_gaps={Phase.SAVING: longest})
    assert bounds_for(rank(Phase.SAVING), times, LIMITS) == bounds
    assert bounds_for(rank(Phase.EVALUATING), times, LIMITS).limit == LIMITS.evaluating_seconds


@pytest.mark.parametrize(("steps", "limit"), [(0, 200), (1, 200), (2, 5.0)])
def test_a_new_controller_knows_the_last_step(steps: int, limit: float) -> None:
    """Samples are lost with the controller that took them; a gang that hangs just then makes no new ones."""
    assert bounds_for(rank(Phase.STEP, steps=steps, step_seconds=0.5), StepTimes(), LIMITS).limit == limit


def test_one_that_saves_explains_why_the_others_wait() -> None:
    """The gang is late only when each rank is late by the limit of its own phase."""
    times = StepTimes(seconds=(0.3,) * 8)
    waiting = [rank(idle=50.0, number=n) for n in range(3)]
    found = until_bounds((*waiting, rank(Phase.SAVING, idle=50.0, number=3)), times, LIMITS)
    assert found is not None
    assert found.limit == 250.0
    assert until_bounds(waiting, times, LIMITS) == pytest.approx((-48.5, -43.5))


def test_the_dead_are_not_waited_for() -> None:
    """A rank that has ended cannot hang; a gang of such has no limit."""
    times = StepTimes(seconds=(0.3,) * 8)
    dead = rank(idle=500.0, exit=RankExit(code=0))
    assert until_bounds((dead, rank(idle=1.0, number=1)), times, LIMITS) == pytest.approx((0.5, 5.5))
    assert until_bounds((dead,), times, LIMITS) is None
