"""Ranks save at the same steps whoever wished for it and whenever, with no word between them but two counters."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mend_trainer.agreement import SaveAgreement


class Counters:
    """What a TCPStore does with `add`."""

    def __init__(self) -> None:
        self.values: dict[str, int] = defaultdict(int)

    def add(self, key: str, amount: int, /) -> int:
        """The new value."""
        self.values[key] += amount
        return self.values[key]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_ranks_save_at_the_same_steps_and_every_wish_is_granted(data: st.DataObject) -> None:
    """However ranks interleave within what synchronous training allows, a device lag of one step included."""
    world, steps = data.draw(st.integers(2, 4)), 14
    counters = Counters()
    ranks = [SaveAgreement(counters, rank=rank) for rank in range(world)]
    wishes = data.draw(st.sets(st.tuples(st.integers(0, world - 1), st.integers(0, steps - 7)), max_size=3))
    saved: list[list[int]] = [[] for _ in range(world)]
    ended = [0] * world  # steps that each rank's host has ended
    while min(ended) < steps:
        # Nobody ends step k + 2 before all have ended step k: the host is at most one step ahead of its device.
        # And a save is a collective: nobody ends the next step before all have come to it.
        lead = [ended[rank] - min(ended) for rank in range(world)]
        able = [
            rank
            for rank in range(world)
            if ended[rank] < steps and lead[rank] < (1 if ended[rank] - 1 in saved[rank] else 2)
        ]
        rank = data.draw(st.sampled_from(able))
        step = ended[rank]
        if ranks[rank].is_due(step, wished=(rank, step) in wishes):
            saved[rank].append(step)
        ended[rank] += 1
    assert all(steps_saved == saved[0] for steps_saved in saved)
    for _, wished_at in wishes:
        assert any(wished_at <= step <= wished_at + 6 for step in saved[0])
    assert len(saved[0]) <= len(wishes)


def test_the_clock_of_rank_0_counts() -> None:
    """An interval in seconds is announced by rank 0 and followed by all."""
    counters, now = Counters(), [0.0]
    ranks = [SaveAgreement(counters, rank=rank, interval_seconds=10, clock=lambda: now[0]) for rank in range(2)]
    saved = []
    for step in range(40):
        now[0] += 1
        due = [rank.is_due(step, wished=False) for rank in ranks]
        assert due[0] == due[1]
        if due[0]:
            saved.append(step)
    assert saved == [11, 23, 35]


def test_an_interval_in_steps_asks_nobody() -> None:
    """Every n-th step, by counting."""
    ranks = [SaveAgreement(Counters(), rank=rank, interval_steps=5) for rank in range(2)]
    assert [[step for step in range(16) if rank.is_due(step, wished=False)] for rank in ranks] == [[4, 9, 14]] * 2


def test_a_save_that_could_not_begin_is_brought_up_again() -> None:
    """The one before was still being written: two steps later all try again."""
    counters = Counters()
    ranks = [SaveAgreement(counters, rank=rank, interval_steps=5) for rank in range(2)]
    saved = []
    for step in range(9):
        due = [rank.is_due(step, wished=False) for rank in ranks]
        assert due[0] == due[1]
        if due[0]:
            saved.append(step)
            if len(saved) == 1:
                for rank in ranks:
                    rank.postpone()
    assert saved == [4, 7]


def test_one_rank_alone_saves_at_once() -> None:
    """There is nobody to agree with."""
    alone = SaveAgreement(None, rank=0)
    assert [alone.is_due(step, wished=step == 1) for step in range(3)] == [False, True, False]


def test_a_loop_that_lets_ranks_run_apart_is_told() -> None:
    """A rank that comes too late for an announcement fails loudly rather than saving alone."""
    counters = Counters()
    first, late = SaveAgreement(counters, rank=0), SaveAgreement(counters, rank=1)
    for step in range(9):
        late.is_due(step, wished=False)
    first.is_due(0, wished=True)
    with pytest.raises(RuntimeError, match=r"set checkpoint\.interval to a number of steps"):
        late.is_due(9, wished=False)
