"""Pure: which worker keeps copies of which other one's snapshots: one that is not likely to fail with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Location:
    """Where a worker is; "" where that is not known, and then it is taken to be apart from all others."""

    worker: int
    node: str = ""
    rack: str = ""


def buddies(workers: Sequence[Location]) -> dict[int, int]:
    """The buddy of each worker, given in the order of their places; none for one that is alone.

    Each is the buddy of exactly one other. They are on different nodes, and in different racks, unless one node or rack
    has more than half of all. In a row that is sorted by rack and node, a shift by the size of the largest group leaves
    every group. Where the next in place will do, it is taken: that does not change as workers move to other nodes.
    """
    if len(workers) < 2:
        return {}
    grouped = sorted(workers, key=lambda each: (each.rack, each.node))
    counts = (Counter(each.rack for each in workers if each.rack), Counter(each.node for each in workers if each.node))
    largest = [max(counted.values()) for counted in counts if counted]
    shifts = {shift for size in largest for shift in (size, len(workers) - size) if 0 < shift < len(workers)}
    ways = [_shifted(workers, 1), *(_shifted(grouped, shift) for shift in sorted(shifts))]
    best = min(ways, key=_closeness)
    return {each.worker: buddy.worker for each, buddy in best}


def _shifted(row: Sequence[Location], by: int) -> list[tuple[Location, Location]]:
    return list(zip(row, [*row[by:], *row[:by]], strict=True))


def _closeness(pairs: Sequence[tuple[Location, Location]]) -> tuple[int, int]:
    """How many are on one node with their buddies, and how many in one rack."""
    same_node = sum(bool(each.node) and each.node == buddy.node for each, buddy in pairs)
    return same_node, sum(bool(each.rack) and each.rack == buddy.rack for each, buddy in pairs)
