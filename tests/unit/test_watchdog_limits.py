"""How long a rank may go without progress: learnt for steps, given for the rest, and the whole gang must be late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mend.model import StepTimes
from mend.protocol import Phase, RankExit, RankReport
from mend.spec import Limits
from mend.watchdog import limit_for, seconds_until_hung, step_limit

LIMITS = Limits(
    start_seconds=100,
    first_step_seconds=200,
    floor_seconds=1.5,
    ceiling_seconds=60,
    saving_seconds=300,
    evaluating_seconds=400,
)


def rank(phase: Phase = Phase.STEP, idle: float = 0.0, steps: int = 5, number: int = 0, **more: object) -> RankReport:
    """A rank that has not progressed for `idle` seconds."""
    return RankReport(rank=number, pid=1, phase=phase, progress_seconds=idle, steps_done=steps, **more)


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [
        ([], None),
        ([0.5], 5.0),  # few samples: ten times the longest
        ([0.5, 2.0, 0.5], 20.0),
        ([1.0] * 8, 3.0),  # no spread: three medians
        ([0.1] * 8, 1.5),  # never below the floor
        ([50.0] * 8, 60.0),  # never above the ceiling
        ([1.0] * 7 + [30.0], 3.0),  # one long step moves nothing
        ([1.0, 2.0] * 4, 1.5 + 10 * 1.4826 * 0.5),  # a wide spread widens it
    ],
)
def test_step_limit(lengths: list[float], limit: float | None) -> None:
    """Three medians, or ten deviations above the median, between floor and ceiling."""
    found = step_limit(StepTimes(seconds=tuple(lengths)), LIMITS)
    assert found == (limit if limit is None else pytest.approx(limit))


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=64))
def test_step_limit_stays_between_floor_and_ceiling(lengths: list[float]) -> None:
    """Whatever the steps were like."""
    found = step_limit(StepTimes(seconds=tuple(lengths)), LIMITS)
    assert found is not None
    assert LIMITS.floor_seconds <= found <= LIMITS.ceiling_seconds


@pytest.mark.parametrize(
    ("report", "limit"),
    [
        (rank(Phase.STARTING), 100),
        (rank(Phase.LOADING), 100),
        (rank(Phase.SAVING), 300),
        (rank(Phase.EXITING), 300),
        (rank(Phase.EVALUATING), 400),
        (rank(Phase.STEP, steps=0), 200),  # compiles
        (rank(Phase.DATA), 3.0),
        (rank(Phase.STEP), 3.0),
        (rank(Phase.COLLECTIVE), 3.0),
    ],
)
def test_each_phase_has_its_limit(report: RankReport, limit: float) -> None:
    """Until something was learnt, the spec's limits hold; a step is learnt once the process has made its first."""
    assert limit_for(report, StepTimes(seconds=(1.0,) * 8), LIMITS) == limit


@pytest.mark.parametrize(("longest", "limit"), [(0.001, LIMITS.floor_seconds), (5.0, 50.0), (90.0, 300.0)])
def test_saving_is_learnt_from_its_longest_gap(longest: float, limit: float) -> None:
    """Ten times the longest time between two marks, within the floor of all learnt limits and the spec's limit."""
    times = StepTimes(longest_gaps={Phase.SAVING: longest})
    assert limit_for(rank(Phase.SAVING), times, LIMITS) == limit
    assert limit_for(rank(Phase.EVALUATING), times, LIMITS) == LIMITS.evaluating_seconds


@pytest.mark.parametrize(("steps", "limit"), [(0, 200), (1, 200), (2, 5.0)])
def test_a_new_controller_knows_the_last_step(steps: int, limit: float) -> None:
    """Samples are lost with the controller that took them; a gang that hangs just then makes no new ones."""
    assert limit_for(rank(Phase.STEP, steps=steps, step_seconds=0.5), StepTimes(), LIMITS) == limit


def test_one_that_saves_explains_why_the_others_wait() -> None:
    """The gang is late only when each rank is late by the limit of its own phase."""
    times = StepTimes(seconds=(1.0,) * 8)
    waiting = [rank(idle=50.0, number=n) for n in range(3)]
    assert seconds_until_hung((*waiting, rank(Phase.SAVING, idle=50.0, number=3)), times, LIMITS) == 250.0
    assert seconds_until_hung((*waiting,), times, LIMITS) == -47.0


def test_the_dead_are_not_waited_for() -> None:
    """A rank that has ended cannot hang; a gang of such has no limit."""
    times = StepTimes(seconds=(1.0,) * 8)
    dead = rank(idle=500.0, exit=RankExit(code=0))
    assert seconds_until_hung((dead, rank(idle=1.0, number=1)), times, LIMITS) == 2.0
    assert seconds_until_hung((dead,), times, LIMITS) is None
