"""Pure: which snapshots are flushed, that is saved although their ranks did not ask for it: some that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole snapshot of one place, as the words of its arena tell of it."""

    slot: int
    sequence: int
    reached: int  # attempt and step in one number, by which snapshots of all places are ordered
    is_owed: bool = False
    is_settled: bool = False


def in_common(places: Sequence[Sequence[Kept]]) -> list[tuple[Kept, ...]]:
    """The snapshots, one of each place, of every step that all places have whole; the newest step first.

    Ranks that were killed in the middle of a copy have the step before in common, whoever was done with his.
    """
    by_step = [{each.reached: each for each in sorted(kept, key=lambda each: each.sequence)} for kept in places]
    steps = set.intersection(*map(set, by_step)) if by_step else set()
    return [tuple(kept[step] for kept in by_step) for step in sorted(steps, reverse=True)]


def to_flush(places: Sequence[Sequence[Kept]], committed: int) -> tuple[Kept, ...]:
    """The snapshots, one of each place, that are to be owed now; () if nothing is to be saved, or not yet.

    That is the newest step that all have whole, unless it or a newer one is `committed`. Never two steps at once: with
    a store that is away, no place would have room for the next snapshot. The step before is asked for once the newest
    was given up, for want of what a rank of another worker did not have whole.
    """
    for snapshots in in_common(places):
        if snapshots[0].reached <= committed:
            return ()
        if not any(each.is_settled for each in snapshots):
            return snapshots
        if any(each.is_owed for each in snapshots):
            return ()  # the others will give it up as well
    return ()
