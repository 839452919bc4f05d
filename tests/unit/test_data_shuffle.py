"""The computed permutation is one, for every size, and differs with seed and epoch."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mend_trainer.data.shuffle import Permutation


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_every_index_is_hit_exactly_once(size: int, seed: int, epoch: int) -> None:
    """range(size) is mapped onto itself."""
    permutation = Permutation(size, seed, epoch)
    assert sorted(permutation[index] for index in range(size)) == list(range(size))


def test_seed_and_epoch_change_the_order() -> None:
    """Two epochs, or two seeds, share no more positions than chance would give."""
    base = [Permutation(1000, 1, 0)[index] for index in range(1000)]
    for other in (Permutation(1000, 2, 0), Permutation(1000, 1, 1)):
        assert sum(other[index] == base[index] for index in range(1000)) < 10


def test_neighbours_are_spread_out() -> None:
    """Sequences that lie side by side are not read side by side."""
    order = [Permutation(10_000, 0, 0)[index] for index in range(10_000)]
    assert sum(abs(one - next_one) == 1 for one, next_one in pairwise(order)) < 20


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(index: int) -> None:
    """There is no sequence of that number."""
    with pytest.raises(IndexError, match="outside"):
        Permutation(5, 0, 0)[index]


def test_a_billion_sequences_cost_nothing() -> None:
    """Any position of a huge epoch is computed without the others."""
    huge = Permutation(10**12, 3, 4)
    assert len({huge[index] for index in (0, 1, 10**11, 10**12 - 1)}) == 4
