"""How often to save: Young's and Daly's estimates against a dumb search, and the bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mend.heartbeats import SaveReport
from mend.interval import PRIOR_SECONDS, between_failures, interval_in_force, launched, optimum, why
from mend.spec import Checkpointing
from mend.states import CheckpointRef
from mend.status import IntervalInForce, Ledger, RunStatus

AUTO = Checkpointing(uri="s3://b/p", interval_auto=True)
COMMITTED = CheckpointRef(uri="s3://b/p/x", step=5, attempt=1)


def waste(interval: float, cost: float, mean: float) -> float:
    """Share of time that is lost with exponential failures: Daly's complete model, without the time to restart."""
    return (math.exp((interval + cost) / mean) - 1) * mean / interval - 1


@settings(max_examples=200)
@given(st.floats(0.01, 600.0), st.floats(600.0, 1e7))
def test_no_other_interval_wastes_noticeably_less(cost: float, mean: float) -> None:
    """Over a grid of intervals from a hundredth to a hundred times as long."""
    chosen = optimum(cost, mean)
    if cost > mean / 2:
        return  # beyond what the estimate is meant for
    grid = [chosen * 10 ** (power / 20) for power in range(-40, 41)]
    least = min(waste(each, cost, mean) for each in grid if each < 50 * mean)
    assert waste(chosen, cost, mean) <= 1.01 * least + 1e-9


def test_youngs_estimate_is_the_limit_of_cheap_saves() -> None:
    """With a cost that is small beside the mean time between failures, both agree."""
    assert optimum(1.0, 1e6) == pytest.approx(math.sqrt(2e6), rel=0.01)
    assert optimum(0.0, 1e6) == 0.0
    assert optimum(100.0, 40.0) == 40.0


@given(st.integers(0, 100), st.floats(0.0, 1e7))
def test_failures_shorten_and_quiet_time_lengthens_it(failures: int, active: float) -> None:
    """The estimate of the rate moves with what is seen, and starts from the prior."""
    assert between_failures(failures + 1, active) < between_failures(failures, active)
    assert between_failures(failures, active + 100.0) > between_failures(failures, active)
    assert between_failures(0, 0.0) == PRIOR_SECONDS


def chosen(status: RunStatus, **report: float) -> IntervalInForce:
    """For a save that was measured."""
    told = SaveReport(committed=COMMITTED, **report) if report else None
    interval = interval_in_force(AUTO, status, told)
    assert interval is not None
    return interval


def test_a_fixed_interval_is_nobodys_business() -> None:
    """Without auto there is none in the status."""
    assert interval_in_force(Checkpointing(uri="s3://b/p", interval_steps=5), RunStatus(), None) is None


def test_the_bounds_and_the_time_to_commit_hold() -> None:
    """Never below the least, above the most, or below what a save needs until it is committed."""
    assert chosen(RunStatus(), stall_seconds=1e-6, commit_seconds=1.0).seconds == 60.0
    assert chosen(RunStatus(), stall_seconds=1e-6, commit_seconds=400.0).seconds == 400.0
    assert chosen(RunStatus(), stall_seconds=1e4, commit_seconds=1.0).seconds == 3600.0
    assert chosen(RunStatus(), stall_seconds=0.5, commit_seconds=1.0).seconds == pytest.approx(146.7, abs=0.5)


def test_it_says_where_it_comes_from() -> None:
    """Before anything was measured, and after."""
    assert chosen(RunStatus()).seconds == 60.0
    assert why(chosen(RunStatus())) == "until a save has been measured"
    status = RunStatus(recoveries=3, ledger=Ledger(productive=7200.0, suspended=1e6))
    told = why(chosen(status, stall_seconds=0.5, commit_seconds=8.0))
    assert "0.5 s and is committed after 8 s; 3 recoveries in 2 h, so one in 2 h" in told


def test_a_cost_outlives_the_attempt_that_it_was_measured_in() -> None:
    """The ranks of a new attempt have not saved yet; what is known goes on to hold."""
    measured = chosen(RunStatus(), stall_seconds=0.5, commit_seconds=8.0)
    after = interval_in_force(AUTO, RunStatus(interval=measured, recoveries=1), None)
    assert after is not None
    assert (after.cost_seconds, after.commit_seconds, after.failures) == (0.5, 8.0, 1)
    assert after.seconds < measured.seconds


def test_ranks_are_not_told_to_save_often_before_it_is_known_what_that_costs() -> None:
    """One early save, which the controller orders, is to measure; until then ranks by themselves keep ten minutes."""
    first = launched(AUTO, RunStatus())
    assert first is not None
    assert (first.seconds, first.launched_seconds) == (60.0, 600.0)
    measured = chosen(RunStatus(interval=first), stall_seconds=0.5, commit_seconds=1.0)
    assert measured.launched_seconds == 600.0
    again = launched(AUTO, RunStatus(interval=measured))
    assert again is not None
    assert again.launched_seconds == again.seconds == measured.seconds
