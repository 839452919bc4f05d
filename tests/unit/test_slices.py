"""Who takes which sample, at any world size and through any change of it: each once, in one order. Pure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mend_trainer.data.slices import pieces_of, slice_of
from mend_trainer.parallel import mesh_shape

WORLDS = st.integers(1, 40)


@given(world=WORLDS, more=st.integers(0, 100))
def test_slices_are_the_batch_cut_by_ranks(world: int, more: int) -> None:
    """In the order of ranks they are the global batch, and no two differ by more than one sample."""
    batch = world + more
    slices = [slice_of(batch, rank, world) for rank in range(world)]
    assert [sample for each in slices for sample in each] == list(range(batch))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(world=WORLDS, more=st.integers(0, 100), micro=st.integers(1, 20))
def test_pieces_are_as_many_on_each_rank_and_small_enough(world: int, more: int, micro: int) -> None:
    """As few as can be, and at most one of a rank's pieces more than its samples need."""
    batch = world + more
    pieces = pieces_of(batch, world, micro)
    sizes = [len(slice_of(batch, rank, world)) for rank in range(world)]
    assert pieces * micro >= max(sizes)
    assert (pieces - 1) * micro < max(sizes)
    assert all(pieces - -(-size // micro) <= 1 for size in sizes)


@given(
    batch=st.integers(8, 64),
    history=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
)
def test_any_history_reads_each_sample_once(batch: int, history: list[tuple[int, int, int]]) -> None:
    """Attempts of any size that each keep some steps, and lose what they did beyond the last save."""
    position = 0
    kept: list[int] = []
    for world, steps, lost in history:
        read = [
            position + step * batch + sample
            for step in range(steps + lost)
            for rank in range(world)
            for sample in slice_of(batch, rank, world)
        ]
        kept += read[: steps * batch]
        position += steps * batch
    assert kept == list(range(position))


@given(world=st.integers(1, 200), wanted=st.integers(0, 200))
def test_a_mesh_never_asks_for_more_memory_than_was_given(world: int, wanted: int) -> None:
    """Copies times shards are the world, and a copy is over no fewer ranks than wanted where the world has so many."""
    copies, shards = mesh_shape(world, wanted)
    assert copies * shards == world
    assert shards >= min(wanted, world)
    assert not any(world % fewer == 0 for fewer in range(max(wanted, 1), shards) if wanted)
    if not wanted:
        assert copies == 1
