"""The fence of a term: a question to the clock, and once closed never open again."""

from __future__ import annotations

import pytest

from mend.kube.election import Fence, NotLeader, Timing


class Clock:
    """A clock that only moves when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_fence_closes_by_itself_when_nothing_renews_it() -> None:
    """Past its time nobody leads, however late the question comes."""
    clock = Clock()
    fence = Fence(term=3, open_until=105.0, clock=clock)
    assert fence.is_leader()
    assert fence.remaining_seconds() == 5.0
    fence.check()
    clock.now = 105.0
    assert not fence.is_leader()
    with pytest.raises(NotLeader, match="term 3"):
        fence.check()


def test_a_renewal_in_time_keeps_it_open() -> None:
    """Each renewal moves the deadline."""
    clock = Clock()
    fence = Fence(term=0, open_until=105.0, clock=clock)
    clock.now = 104.0
    fence.extend(109.0)
    clock.now = 108.0
    assert fence.is_leader()


def test_a_renewal_that_comes_late_does_not_open_it_again() -> None:
    """A process that was stopped past its deadline cannot renew itself back into leadership."""
    clock = Clock()
    fence = Fence(term=0, open_until=105.0, clock=clock)
    clock.now = 106.0
    fence.extend(111.0)
    assert not fence.is_leader()
    clock.now = 100.0
    assert not fence.is_leader()


@pytest.mark.parametrize("timing", [(8, 8.0, 1.0), (8, 5.0, 5.0), (8, 5.0, 0.0)])
def test_timing_that_cannot_be_safe_is_refused(timing: tuple[int, float, float]) -> None:
    """The leader must give up before others take over, and must try more than once until then."""
    with pytest.raises(ValueError, match="retry < renew_deadline < lease"):
        Timing(lease=timing[0], renew_deadline=timing[1], retry=timing[2])
