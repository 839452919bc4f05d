"""The throttle of copies, with a clock that the test moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mend_trainer.copies.throttle import Throttle

PIECES = st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 0.5)), min_size=1, max_size=60)


@given(PIECES, st.integers(100, 100_000))
def test_no_window_sees_more_than_the_cap(pieces: list[tuple[int, float]], rate: int) -> None:
    """However long the pauses, no window passes more than its share, a tenth of a second's and a piece."""
    now = 0.0
    throttle = Throttle(rate, lambda: now)
    sent: list[tuple[float, int]] = []
    for size, pause in pieces:
        now += throttle.book(size)
        sent.append((now, size))
        now += pause
    for first, (start, size) in enumerate(sent):
        total = size
        for end, more in sent[first + 1 :]:
            total += more
            assert total <= rate * (end - start + 0.1) + max(size for size, _ in pieces) + 1e-6 * total


@given(PIECES, st.integers(100, 100_000))
def test_a_busy_sender_gets_all_that_the_cap_allows(pieces: list[tuple[int, float]], rate: int) -> None:
    """Without pauses the bytes take as long as the cap says, and no longer."""
    now = 0.0
    throttle = Throttle(rate, lambda: now)
    for size, _ in pieces:
        now += throttle.book(size)
    assert now <= sum(size for size, _ in pieces) / rate + 1e-6


def test_without_a_cap_nothing_waits() -> None:
    """0 bytes a second means as fast as it goes."""
    throttle = Throttle(0, lambda: 0.0)
    assert [throttle.book(10**12) for _ in range(3)] == [0.0, 0.0, 0.0]


@given(st.integers(1, 1 << 40))
def test_pieces_are_small_enough_to_trickle(rate: int) -> None:
    """Under a small cap pieces are small, so that the other end is not left without a byte until it gives up."""
    length = Throttle(rate).piece_bytes(1 << 18)
    assert 4096 <= length <= 1 << 18
    assert length == 4096 or length / rate <= 0.25


def test_transfers_share_the_cap() -> None:
    """Two transfers at once are booked one behind the other."""
    throttle = Throttle(1000, lambda: 100.0)
    assert [round(throttle.book(1000), 3) for _ in range(2)] == [0.9, 1.9]
