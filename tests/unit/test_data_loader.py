"""The loader consumes each sequence exactly once, through restarts and changes of world size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mend_trainer.data.loader import Loader, PositionMisfit
from mend_trainer.data.shards import TokenSplit, pack


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    """Some 300 sequences of 8 tokens, no two alike, in several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    for part in range(6):
        numbers = range(100 * part, 100 * part + 100)
        (folder / f"{part}.bin").write_bytes(b"".join(number.to_bytes(4, "big") for number in numbers))
    packed = pack(str(folder), folder / ".cache", shard_tokens=500)
    assert len(packed.train.parts) > 1
    return packed.train


def a_loader(
    split: TokenSplit,
    rank: int = 0,
    world: int = 1,
    batch: int = 12,
    seed: int = 5,
    length: int = 8,
    accept: Sequence[str] = (),
) -> Loader:
    return Loader(
        split,
        sequence_length=length,
        global_batch=batch,
        seed=seed,
        rank=rank,
        world_size=world,
        accept=accept,
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_samples_are_consumed_once_whatever_happens(split: TokenSplit, data: st.DataObject) -> None:
    """Over one epoch, attempts of any world size that each resume from a saved position leave nothing out or twice."""
    batch = data.draw(st.integers(7, 40))
    consumed: Counter[tuple[int, ...]] = Counter()
    state = a_loader(split, batch=batch).state_dict()
    epoch = a_loader(split).sequences // batch
    steps_left = epoch
    while steps_left:
        world = data.draw(st.integers(1, 7), "world size")
        ranks = [a_loader(split, rank, world, batch) for rank in range(world)]
        for loader in ranks:
            loader.load_state_dict(state)
        kept, lost = data.draw(st.integers(1, steps_left), "steps kept"), data.draw(st.integers(0, 2), "steps lost")
        for _ in range(kept):
            consumed.update(tuple(row.tolist()) for loader in ranks for row in next(loader).inputs)
        state = ranks[-1].state_dict()
        for loader in ranks:
            for _ in range(lost):
                next(loader)
        steps_left -= kept
    assert set(consumed.values()) == {1}
    assert len(consumed) == epoch * batch


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_history_has_the_order_of_an_undisturbed_run(split: TokenSplit, data: st.DataObject) -> None:
    """Over several epochs, batches that lie across their borders among them: step by step, in the order of ranks."""
    batch = data.draw(st.integers(7, 90))
    calm, state = a_loader(split, batch=batch), a_loader(split, batch=batch).state_dict()
    while calm.position < 2.5 * calm.sequences:
        world = data.draw(st.integers(1, 7), "world size")
        ranks = [a_loader(split, rank, world, batch) for rank in range(world)]
        for loader in ranks:
            loader.load_state_dict(state)
        for _ in range(data.draw(st.integers(1, 40), "steps kept")):
            rows = [row for loader in ranks for row in next(loader).inputs.tolist()]
            assert rows == next(calm).inputs.tolist()
        state = ranks[-1].state_dict()
        assert state == calm.state_dict()
        for loader in ranks:
            next(loader)  # done, and lost


def test_targets_are_the_inputs_one_token_later(split: TokenSplit) -> None:
    """And one epoch of inputs is the text, cut into sequences, also where one crosses into the next shard."""
    sequences = a_loader(split).sequences
    batch = next(a_loader(split, batch=sequences))
    assert len(batch) == sequences
    assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    text = split.read(0, split.tokens).tolist()
    rows = {
        (*inputs, targets[-1]) for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
    }
    assert rows == {tuple(text[start : start + 9]) for start in range(0, 8 * sequences, 8)}


def test_the_second_epoch_has_another_order(split: TokenSplit) -> None:
    """The same sequences again, shuffled anew."""
    loader = a_loader(split, batch=a_loader(split).sequences)
    first, second = next(loader), next(loader)
    assert loader.state_dict()["epoch"] == 2
    assert not (first.inputs == second.inputs).all()
    assert sorted(first.inputs.tolist()) == sorted(second.inputs.tolist())


@pytest.mark.parametrize(
    ("field", "other"),
    [("seed", {"seed": 6}), ("sequence_length", {"length": 9}), ("global_batch", {"batch": 13})],
)
def test_a_position_in_something_else_is_refused(split: TokenSplit, field: str, other: dict[str, int]) -> None:
    """The error names the field and both values, and says that trying again cannot help."""
    with pytest.raises(PositionMisfit, match=field) as caught:
        a_loader(split, **other).load_state_dict(a_loader(split).state_dict())
    assert caught.value.mend_fatal


def test_another_global_batch_may_be_accepted(split: TokenSplit) -> None:
    """By name: the position counts samples, so none is repeated or left out."""
    saved = a_loader(split)
    next(saved)
    loader = a_loader(split, batch=5, accept=["global_batch"])
    loader.load_state_dict(saved.state_dict())
    reference = a_loader(split, batch=17)
    assert next(loader).inputs.tolist() == next(reference).inputs[12:].tolist()


@pytest.mark.parametrize("change", ["a byte", "a document", "the vocabulary"])
def test_a_position_in_other_data_is_refused(change: str, tmp_path: Path) -> None:
    """A corpus that changed by one byte, or that another vocabulary packed, has another order of samples."""
    folder = tmp_path / "text"
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.txt").write_text(f"document {part} " * 50)
    before = pack(str(folder), tmp_path / "cache").train
    match change:
        case "a byte":
            (folder / "1.txt").write_text("Document 1 " * 50)
        case "a document":
            (folder / "1.txt").unlink()
    vocabulary = "bpe" if change == "the vocabulary" else "bytes"
    after = pack(str(folder), tmp_path / "cache", vocabulary=vocabulary, vocabulary_size=300).train
    with pytest.raises(PositionMisfit, match="the text or the vocabulary changed"):
        a_loader(after).load_state_dict(a_loader(before).state_dict())


def test_too_little_text_says_what_to_do(split: TokenSplit) -> None:
    """Not one whole sequence is an error at once, not an endless loop."""
    with pytest.raises(ValueError, match=r"too few for one sequence of 5000: take more text or a shorter"):
        a_loader(split, length=5000)


def test_fewer_samples_than_ranks_is_refused(split: TokenSplit) -> None:
    """A rank without a sample could not take part in a step."""
    with pytest.raises(ValueError, match="global_batch: 2, expected at least one sample for each of the 3 ranks"):
        a_loader(split, world=3, batch=2)
