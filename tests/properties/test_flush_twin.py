"""What is flushed, against a dumb twin that tries every choice of a snapshot for each place; and in gangs that die."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mend_trainer.flushing import Kept, in_common, to_flush

STEPS = st.integers(1, 6)


@st.composite
def places(draw: st.DrawFn) -> list[list[Kept]]:
    """Up to three places, each with up to two whole snapshots, the later of which need not be of a later step."""
    return [
        [
            Kept(
                slot=slot,
                sequence=2 * draw(st.integers(1, 2)) + 4 * slot,
                reached=draw(STEPS),
                is_owed=(state := draw(st.sampled_from(("", "owed", "settled")))) == "owed",
                is_settled=state == "settled",
            )
            for slot in draw(st.sampled_from(((), (0,), (1,), (0, 1))))
        ]
        for _ in range(draw(st.integers(1, 3)))
    ]


def dumb(kept: list[list[Kept]], committed: int) -> tuple[Kept, ...]:
    """The best of all choices of which each is of one step, newer than what is committed, and not given up."""
    of_one_step = [choice for choice in product(*kept) if len({each.reached for each in choice}) == 1]
    of_one_step.sort(key=lambda choice: (choice[0].reached, [each.sequence for each in choice]))
    newest = {choice[0].reached: choice for choice in of_one_step}
    able = [
        choice
        for step, choice in newest.items()
        if step > committed and not any(each.is_settled for each in choice)
        if not any(each.is_owed for later in newest.values() if later[0].reached > step for each in later)
    ]
    return max(able, key=lambda choice: choice[0].reached, default=())


@settings(max_examples=500, deadline=None)
@given(places(), st.integers(0, 6))
def test_the_flush_is_the_best_of_all_choices(kept: list[list[Kept]], committed: int) -> None:
    """The newest step that all places have whole and that nobody has given up, unless a newer one may yet be saved."""
    assert to_flush(kept, committed) == dumb(kept, committed)


@settings(max_examples=500, deadline=None)
@given(places(), st.integers(0, 6))
def test_two_steps_are_never_asked_for_at_once(kept: list[list[Kept]], committed: int) -> None:
    """Asked again and again, with none settled meanwhile, the flush names the same snapshots: the other slots are free.

    So with a store that is away every place has room for the next snapshot, if it had before.
    """
    first = to_flush(kept, committed)
    asked = {(place, each.slot) for place, each in enumerate(first)}
    after = [
        [
            Kept(each.slot, each.sequence, each.reached, True, False) if (place, each.slot) in asked else each
            for each in own
        ]
        for place, own in enumerate(kept)
    ]
    again = to_flush(after, committed)
    assert [each.slot for each in again] == [each.slot for each in first]


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_ranks_that_die_in_the_middle_of_a_copy_still_add_up(ranks: int, steps: int, data: st.DataObject) -> None:
    """Wherever each was killed, at most a step is lost: that which all were about to take, or none if all have it."""
    published = data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks))  # the last snapshot, by rank
    kept = []
    for is_done in published:
        whole = [step for step in (steps - 1, steps) if step > 0 and (step < steps or is_done)]
        kept.append([Kept(slot=step % 2, sequence=2 * step, reached=step) for step in whole])
    snapshots = to_flush(kept, 0)
    newest = steps if all(published) else steps - 1
    assert [each.reached for each in snapshots] == [newest] * ranks * (newest > 0)


def test_a_place_without_snapshots_leaves_nothing_that_adds_up() -> None:
    """Nor do no places at all."""
    assert in_common([]) == []
    assert to_flush([[Kept(slot=0, sequence=2, reached=3)], []], 0) == ()
