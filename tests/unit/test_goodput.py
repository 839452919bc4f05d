"""The ledger of seconds: every second is booked once, on what the run was doing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mend.goodput import account, book_detection, book_lost_steps, suspended_seconds
from mend.incidents import FailureClass, IncidentKind, IncidentRecord
from mend.status import Ledger, RunPhase, RunStatus

ENTRIES = ("pending", "starting", "productive", "lost", "detecting", "recovering", "suspended")


def total(ledger: Ledger) -> float:
    """All seconds in it."""
    return sum(float(getattr(ledger, entry)) for entry in ENTRIES)


@pytest.mark.parametrize(
    ("phase", "participants", "entry"),
    [
        (RunPhase.PENDING, (), "pending"),
        (RunPhase.PENDING, (0,), "starting"),
        (RunPhase.RUNNING, (0,), "productive"),
        (RunPhase.RECOVERING, (0,), "recovering"),
        (RunPhase.RECOVERING, (), "recovering"),
        (RunPhase.SUSPENDED, (), "suspended"),
    ],
)
def test_seconds_go_where_the_phase_says(phase: RunPhase, participants: tuple[int, ...], entry: str) -> None:
    """Each phase has its entry."""
    status = account(RunStatus(phase=phase, participants=participants, accounted_at=10.0), 17.5)
    assert getattr(status.ledger, entry) == 7.5
    assert total(status.ledger) == 7.5


phases = st.sampled_from([RunPhase.PENDING, RunPhase.RUNNING, RunPhase.RECOVERING, RunPhase.SUSPENDED])


@given(st.lists(st.tuples(phases, st.floats(0, 1e4), st.floats(0, 1e4), st.integers(0, 50))))
def test_the_sum_is_the_time_elapsed(life: list[tuple[RunPhase, float, float, int]]) -> None:
    """However seconds are booked and moved between entries, none is lost and none made; goodput is a share."""
    status, now = RunStatus(accounted_at=0.0), 0.0
    for phase, seconds, before, steps in life:
        now += seconds
        status = replace(account(status, now), phase=phase)
        incident = IncidentRecord(
            id=1,
            kind=IncidentKind.HUNG,
            failure=FailureClass.HANG,
            attempt=1,
            step=1,
            began_at=now - before,
            detected_at=now,
        )
        ledger = book_lost_steps(book_detection(status.ledger, incident), steps, 0.5)
        status = replace(status, ledger=ledger)
    assert total(status.ledger) == pytest.approx(now)
    assert all(getattr(status.ledger, entry) >= 0 for entry in ENTRIES)
    assert 0.0 <= status.ledger.goodput <= 1.0


def test_a_clock_set_back_books_nothing_and_goes_on_from_there() -> None:
    """Neither negative seconds nor a standstill until the clock has caught up."""
    status = account(RunStatus(phase=RunPhase.RUNNING, accounted_at=1000.0), 400.0)
    assert total(status.ledger) == 0.0
    assert account(status, 410.0).ledger.productive == 10.0


def test_after_the_end_nothing_is_booked() -> None:
    """The ledger stands once the run has ended."""
    assert total(account(RunStatus(phase=RunPhase.SUCCEEDED, accounted_at=0.0), 100.0).ledger) == 0.0


def test_a_suspension_counts_before_it_is_booked() -> None:
    """The deadline asks how long a run was suspended while it still is."""
    status = RunStatus(phase=RunPhase.SUSPENDED, accounted_at=50.0, ledger=Ledger(suspended=5.0))
    assert suspended_seconds(status, 60.0) == 15.0
    assert suspended_seconds(replace(status, phase=RunPhase.RUNNING), 60.0) == 5.0
