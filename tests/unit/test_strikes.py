"""The book of strikes: what counts, for how long, what counts once, and how it becomes lenient."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mend import strikes
from mend.incidents import Strike

NOW = 1_000_000.0
DAY = 86_400.0


def a_strike(
    number: int = 1, node: str = "node-1", *, ago: float = 0.0, run: str = "team/clio", **more: bool
) -> Strike:
    """A strike of incident `number` of the run, given so many seconds ago, that counts for a day."""
    at = NOW - ago
    return Strike(
        id=f"{run}/{number}/{node}",
        node=node,
        run=run,
        reason=f"because of {number}",
        struck_at=at,
        expires_at=at + DAY,
        **more,
    )


ONE, OTHER = a_strike(1, ago=7200), a_strike(2, ago=60)


@pytest.mark.parametrize(
    ("book", "is_excluded"),
    [
        ((), False),
        ((ONE,), False),
        ((ONE, OTHER), True),
        ((ONE, a_strike(2, ago=DAY)), False),
        ((ONE, a_strike(2, lifted=True)), False),
        ((ONE, a_strike(2, "node-2")), False),
        ((a_strike(1, decisive=True),), True),
        ((a_strike(1, decisive=True, lifted=True),), False),
        ((ONE, a_strike(1, run="team/other")), True),
    ],
    ids=["none", "one", "two", "one expired", "one lifted", "elsewhere", "decisive", "lifted decisive", "of two runs"],
)
def test_from_the_limit_on_a_node_is_excluded(book: tuple[Strike, ...], is_excluded: bool) -> None:
    """Two strikes that count, of whichever runs, or one that is decisive, exclude a node; fewer do not."""
    assert strikes.is_excluded(book, "node-1", 2, NOW) is is_excluded
    assert ("node-1" in strikes.excluded(book, 2, NOW)) is is_excluded


def test_told_twice_counts_once() -> None:
    """The same strike again, and another of the same run within ten minutes, change nothing; a later one counts."""
    book = strikes.struck((), ONE)
    assert strikes.struck(book, ONE) == book
    assert strikes.struck(book, a_strike(2, ago=7200 - strikes.BURST_SECONDS + 1)) == book
    assert len(strikes.struck(book, OTHER)) == 2
    assert len(strikes.struck(book, a_strike(2, ago=7100, run="team/other"))) == 2


def test_the_worst_of_a_burst_stays() -> None:
    """A decisive complaint after a lesser one of the same burst makes that one decisive, with its reason."""
    (kept,) = strikes.struck((ONE,), a_strike(2, ago=7100, decisive=True))
    assert (kept.id, kept.decisive, kept.reason) == (ONE.id, True, "because of 2")


def test_what_was_seen_is_no_longer_presumed() -> None:
    """Of one complaint that was presumed and one that was seen, what stays cannot be refuted any more."""
    presumed, seen = a_strike(1, ago=7200, presumed=True), a_strike(2, ago=7100)
    assert [each.presumed for each in strikes.struck((presumed,), seen)] == [False]
    assert [each.presumed for each in strikes.struck((presumed,), replace(seen, presumed=True))] == [True]


def test_a_lifted_strike_is_not_entered_again() -> None:
    """Whoever gave it may enter it again and again: it stays lifted."""
    book = strikes.lifted((ONE, OTHER), (ONE.id,))
    assert [each.lifted for each in strikes.merged(book, (ONE, OTHER))] == [True, False]


def test_the_oldest_are_lifted_first() -> None:
    """Of several nodes, all strikes of the one whose last strike is oldest; of none, when none has any that count."""
    book = (ONE, a_strike(2, "node-2", ago=9000), a_strike(3, "node-2", ago=100), a_strike(4, "node-3", ago=DAY))
    assert strikes.most_lenient(book, ("node-1", "node-2", "node-3"), NOW) == (ONE,)
    assert [each.id for each in strikes.most_lenient(book, ("node-2",), NOW)] == [book[1].id, book[2].id]
    assert strikes.most_lenient(book, ("node-3", "node-4"), NOW) == ()


def test_the_book_keeps_the_newest_that_count() -> None:
    """What has expired goes, and beyond the bound the oldest."""
    assert strikes.kept((ONE, a_strike(3, ago=DAY)), NOW) == (ONE,)
    assert strikes.kept((OTHER, ONE), NOW, 1) == (OTHER,)


def test_no_more_nodes_are_excluded_than_a_pod_can_say() -> None:
    """Beyond the bound those with the newest strikes."""
    book = [a_strike(n, f"node-{n}", ago=float(n), decisive=True) for n in range(strikes.MAX_EXCLUDED + 5)]
    found = strikes.excluded(book, 2, NOW)
    assert found == tuple(f"node-{n}" for n in range(strikes.MAX_EXCLUDED))


def test_a_strike_in_words() -> None:
    """Node, reason, run, age and how long it counts, for people."""
    assert strikes.in_words(ONE, NOW) == "node-1: because of 1 (run team/clio, 2.0 h ago, for another 22.0 h)"
    assert "lifted" in strikes.in_words(a_strike(1, lifted=True), NOW)


STRIKES = st.builds(
    a_strike,
    st.integers(0, 5),
    st.sampled_from(["node-1", "node-2"]),
    ago=st.floats(0, 2 * DAY),
    run=st.sampled_from(["team/clio", "team/other"]),
    decisive=st.booleans(),
)


@given(st.lists(STRIKES, max_size=8), STRIKES)
def test_more_strikes_never_free_a_node(book: list[Strike], more: Strike) -> None:
    """Entering a strike excludes no fewer nodes than before, and twice is the same as once."""
    before = strikes.merged((), book)
    after = strikes.struck(before, more)
    assert set(strikes.excluded(before, 2, NOW)) <= set(strikes.excluded(after, 2, NOW))
    assert strikes.struck(after, more) == after
