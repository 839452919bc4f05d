"""Who keeps copies for whom: each for one, far away where there is a far away, and the same each time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mend.buddies import Location, buddies

sizes = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4)


@st.composite
def clusters(draw: st.DrawFn) -> list[Location]:
    """Racks of nodes of workers, in any order of places."""
    homes = [
        (f"rack-{r}", f"node-{r}-{n}")
        for r, nodes in enumerate(draw(sizes))
        for n, k in enumerate(nodes)
        for _ in range(k)
    ]
    named = draw(st.booleans())
    workers = [Location(n, node, rack if named else "") for n, (rack, node) in enumerate(homes)]
    return draw(st.permutations(workers))


def largest_share(names: list[str]) -> float:
    """Of one name among all."""
    return max(Counter(names).values()) / len(names)


@given(clusters())
def test_each_keeps_copies_for_one_other_on_another_node_and_rack_where_that_can_be(workers: list[Location]) -> None:
    """Nobody for himself, nobody for two; apart unless a node or rack has more than half of all workers."""
    chosen, at = buddies(workers), {each.worker: each for each in workers}
    if len(workers) == 1:
        assert chosen == {}
        return
    assert sorted(chosen) == sorted(chosen.values()) == sorted(at)
    assert all(worker != buddy for worker, buddy in chosen.items())
    assert chosen == buddies(workers)
    pairs = [(at[worker], at[buddy]) for worker, buddy in chosen.items()]
    if largest_share([each.node for each in workers]) <= 0.5:
        assert all(each.node != buddy.node for each, buddy in pairs)
    if workers[0].rack and largest_share([each.rack for each in workers]) <= 0.5:
        assert all(each.rack != buddy.rack for each, buddy in pairs)


def test_with_a_node_for_each_the_next_place_is_the_buddy_wherever_they_move() -> None:
    """So a pod that comes up elsewhere changes nobody's buddy."""
    before = [Location(n, f"node-{n}") for n in range(5)]
    after = [*before[:2], Location(2, "node-9"), *before[3:]]
    assert buddies(before) == buddies(after) == {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}


def test_where_all_are_on_one_node_a_copy_is_kept_all_the_same() -> None:
    """It survives the loss of a pod."""
    assert buddies([Location(0, "node"), Location(1, "node")]) == {0: 1, 1: 0}


def test_a_rack_that_has_most_workers_shares_out_what_can_be() -> None:
    """Two workers elsewhere keep copies of two of the four in the large rack, and these of theirs."""
    workers = [Location(n, f"node-{n}", "large") for n in range(4)] + [
        Location(n, f"node-{n}", "small") for n in (4, 5)
    ]
    rack = {each.worker: each.rack for each in workers}
    assert sum(rack[worker] == rack[buddy] for worker, buddy in buddies(workers).items()) == 2


def test_workers_of_which_nothing_is_known_count_as_apart() -> None:
    """A pod that is not yet bound has no node, and no worse a buddy for that."""
    assert buddies([Location(0), Location(1), Location(2)]) == {0: 1, 1: 2, 2: 0}
