"""Who writes what, how it is framed, and which reads fetch it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests import a_manifest
from mend.manifest import Chunk, Manifest, StoredObject, TensorEntry
from mend_trainer.checkpoint.copying import batches
from mend_trainer.checkpoint.dcp import Corrupt, metadata_of
from mend_trainer.checkpoint.fit import compare
from mend_trainer.checkpoint.layout import Block, assign, blocks_of, leaves
from mend_trainer.checkpoint.reader import Wanted, runs
from mend_trainer.checkpoint.record import frame


def a_block(name: str, offset: int, length: int) -> Block:
    """A block of a float32 vector of 100 elements."""
    return Block(
        name=name, path=tuple(name.split(".")), dtype="float32", shape=(100,), offsets=(offset,), sizes=(length,)
    )


BLOCKS = st.builds(a_block, st.sampled_from(["a", "b", "c.d"]), st.integers(0, 9), st.integers(1, 90))


@given(st.lists(st.lists(BLOCKS, max_size=12), min_size=1, max_size=6))
def test_every_block_is_written_once_by_a_rank_that_holds_it(held: Sequence[Sequence[Block]]) -> None:
    """Whatever the ranks hold, each distinct block is written by exactly one of its holders."""
    written = assign(held)
    assert len(written) == len(held)
    for rank, blocks in enumerate(written):
        assert all(block in held[rank] for block in blocks)
    flat = [block for blocks in written for block in blocks]
    assert sorted(map(repr, flat)) == sorted({repr(block) for blocks in held for block in blocks})


@given(st.integers(1, 8), st.lists(st.integers(1, 90), min_size=1, max_size=40))
def test_replicas_are_shared_out_evenly(ranks: int, lengths: list[int]) -> None:
    """Of what all ranks hold alike, no rank writes more than its share and one block."""
    blocks = [a_block(f"w{number}", 0, length) for number, length in enumerate(lengths)]
    loads = [sum(block.bytes for block in written) for written in assign([blocks] * ranks)]
    assert max(loads) <= sum(loads) / ranks + 4 * max(lengths)


def test_ranks_that_disagree_on_a_tensor_are_told_which() -> None:
    """Two ranks with tensors of the same name and different shapes cannot save, and the tensor is named."""
    here = blocks_of({"model": {"w": torch.zeros(3)}})
    there = blocks_of({"model": {"w": torch.zeros(4)}})
    with pytest.raises(ValueError, match=r"model\.w"):
        assign([here, there])


@pytest.mark.parametrize("leaf", [1.5, "text", None, [torch.zeros(1)], torch.zeros(2).to_sparse()])
def test_a_leaf_that_is_no_tensor_is_named(leaf: object) -> None:
    """A state with anything but dense tensors in it is refused by the name of the leaf."""
    with pytest.raises(TypeError, match="'odd'"):
        list(leaves({"model": {"odd": leaf}}))


@pytest.mark.parametrize("sizes", [(), (1,), (7, 3), (0, 4), (64, 64)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64]
)
def test_framed_bytes_are_a_record_of_torch_save(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Raw bytes in their frame load with torch.load as the tensor they came from, and lie on a 64-byte boundary."""
    tensor = torch.arange(math.prod(sizes)).reshape(sizes).to(dtype)
    around = frame(str(dtype).removeprefix("torch."), sizes)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    loaded = torch.load(io.BytesIO(around.head + raw + around.tail), weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    assert not raw or len(around.head) % 64 == 0


@given(st.lists(st.integers(0, 60 << 20), max_size=12))
def test_the_copy_moves_every_byte_once(lengths: list[int]) -> None:
    """Cut into batches, the moves are the same bytes in the same order, and all batches but the last are equal."""
    moves, target = [], 0
    for length in lengths:
        moves.append((target, 2 * target, length))
        target += length
    cut = list(batches(moves))
    assert [sum(length for *_, length in run) for run in cut[:-1]] == [16 << 20] * (len(cut) - 1)
    position = 0
    for to, source, length in (move for run in cut for move in run):
        (owner,) = [move for move in moves if move[0] <= to < move[0] + move[2]]
        assert to == position
        assert source - owner[1] == to - owner[0]
        assert length <= owner[0] + owner[2] - to
        position += length
    assert position == sum(lengths)


CHUNKS = st.builds(
    lambda key, start, length: Wanted(
        name="w",
        chunk=Chunk(offsets=(0,), sizes=(length,), key=key, start_byte=start, length_bytes=length, digest=""),
        dtype=torch.uint8,
        parts=(),
    ),
    st.sampled_from(["x", "y"]),
    st.integers(0, 1 << 28),
    st.one_of(st.integers(1, 1 << 12), st.integers(1 << 24, 1 << 26)),
)


@given(st.lists(CHUNKS, max_size=30))
def test_reads_fetch_every_chunk_once_and_little_else(wanted: list[Wanted]) -> None:
    """Each chunk is in one read, which stays in one object and, unless it is one chunk, within its bound."""
    grouped = runs(wanted)
    assert sorted(map(repr, (one for run in grouped for one in run))) == sorted(map(repr, wanted))
    for run in grouped:
        start = run[0].chunk.start_byte
        stop = max(one.chunk.start_byte + one.chunk.length_bytes for one in run)
        assert len({one.chunk.key for one in run}) == 1
        assert len(run) == 1 or stop - start <= 32 << 20
        assert stop == run[-1].chunk.start_byte + run[-1].chunk.length_bytes


def one_of(**tensors: TensorEntry) -> Manifest:
    """A manifest of these tensors."""
    return a_manifest(objects=(StoredObject(key="k", bytes=1),), tensors=tensors)


def an_entry(*lengths: int, shape: tuple[int, ...] = (10,), dtype: str = "float32") -> TensorEntry:
    """A vector of 10 in chunks of these lengths."""
    chunks, offset = [], 0
    for length in lengths:
        chunks.append(
            Chunk(offsets=(offset,), sizes=(length,), key="k", start_byte=0, length_bytes=4 * length, digest="")
        )
        offset += length
    return TensorEntry(dtype=dtype, shape=shape, chunks=tuple(chunks))


@pytest.mark.parametrize(
    "entry",
    [
        an_entry(4, 5),
        an_entry(4, 7),
        an_entry(5, 5, shape=(2, 5)),
        an_entry(10, dtype="float64"),
        an_entry(10, dtype="float33"),
        an_entry(10, dtype="load"),
        an_entry(-1, 11),
    ],
)
def test_a_manifest_that_contradicts_itself_is_corrupt(entry: TensorEntry) -> None:
    """Chunks that do not cover their tensor, or are of another size than they say, are never believed."""
    assert metadata_of(one_of(w=an_entry(4, 6)))
    with pytest.raises(Corrupt, match="w"):
        metadata_of(one_of(w=entry))


def test_what_one_rank_owns_may_be_absent_or_surplus() -> None:
    """Another world size lacks or adds only tensors of single ranks; all other differences are problems by name."""
    saved = one_of(**{"ranks.1.cpu": an_entry(10), "model.gone": an_entry(10), "model.other": an_entry(10)})
    mine = {"ranks.0.cpu": torch.zeros(3), "model.new": torch.zeros(2), "model.other": torch.zeros(11)}
    fit = compare(saved, mine)
    assert fit.absent == ("ranks.0.cpu",)
    assert fit.surplus == {"model.gone"}
    assert fit.problems == (
        "model.new: float32 [2] in the model, missing in the checkpoint",
        "model.other: float32 [10] in the checkpoint, float32 [11] in the model",
    )
