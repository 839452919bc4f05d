"""The arena: what is published is whole, and nothing that is owed is ever overwritten."""

from __future__ import annotations

from dataclasses import replace

import torch

from mend_trainer.arenas import Arenas
from mend_trainer.checkpoint.arena import Arena, Draft, Header, Origin, Snapshot
from mend_trainer.checkpoint.layout import Block, blocks_of, local_tensors
from mend_trainer.checkpoint.sources import sheet_of
from mend_trainer.slots import arena_path, packed


def a_state(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several kinds."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(40, 33, generator=drawn),
        "turned": torch.randn(5, 7, generator=drawn).t(),
        "conjugate": torch.randn(9, dtype=torch.complex64, generator=drawn).conj(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(float(seed)),
    }


def a_header(step: int, blocks: tuple[Block, ...]) -> Header:
    """The header of a snapshot of one rank alone."""
    origin = Origin(
        run="team/clio",
        run_uid="u",
        attempt=1,
        lineage=(),
        config_digest="",
        step=step,
        tokens=step,
        values={"a": step},
    )
    return Header(save_id=f"{step:016x}", origin=origin, rank=0, world_size=1, blocks=blocks, uri="file:///nowhere")


def draw(arena: Arena, step: int) -> Draft | None:
    """Begin a snapshot of that step and copy its state."""
    state = a_state(step)
    draft = arena.begin(blocks_of(state))
    if draft is not None:
        draft.fill(local_tensors(state))
    return draft


def take(arena: Arena, step: int, *, owed: bool = True) -> Snapshot | None:
    """Take a snapshot of the state of that step, if there is room."""
    draft = draw(arena, step)
    return draft.publish(a_header(step, draft.blocks), owed=owed) if draft is not None else None


def holds(snapshot: Snapshot, step: int) -> bool:
    """Whether its bytes are those of that step's state."""
    tensors = a_state(step)
    return all(
        bytes(snapshot.raw(index)) == tensors[block.name].contiguous().resolve_conj().numpy().tobytes()
        for index, block in enumerate(snapshot.header.blocks)
    )


def test_another_process_sees_what_was_published() -> None:
    """A snapshot is read whole by whoever opens the arena by its path, header and bytes."""
    arena = Arena.create("a")
    take(arena, 3)
    (seen,) = Arena.attach(arena_path(arena.descriptor)).snapshots()
    assert (seen.header.origin.step, seen.header.origin.values, seen.is_owed) == (3, {"a": 3}, True)
    assert holds(seen, 3)


def test_what_is_owed_is_never_overwritten() -> None:
    """With both snapshots owed there is no room; once the saver has settled one, its place is taken."""
    arena = Arena.create("a")
    first, second = take(arena, 1), take(arena, 2)
    assert first is not None
    assert second is not None
    assert take(arena, 3) is None
    first.settle(b"done")
    assert take(arena, 3) is not None
    assert [snapshot.header.origin.step for snapshot in arena.snapshots()] == [2, 3]
    assert not first.is_whole
    assert holds(second, 2)


def test_what_is_not_owed_gives_way_oldest_first() -> None:
    """A snapshot that stays in memory is replaced by the next but one, or by the next if the other is owed."""
    arena = Arena.create("a")
    for step in (1, 2, 3):
        take(arena, step, owed=False)
    assert [snapshot.header.origin.step for snapshot in arena.snapshots()] == [2, 3]
    take(arena, 4)
    for step in (5, 6):
        take(arena, step, owed=False)
    assert [snapshot.header.origin.step for snapshot in arena.snapshots()] == [4, 6]


def test_a_torn_snapshot_is_none() -> None:
    """What was not published is not there, and its room is the first to be taken again."""
    arena = Arena.create("a")
    take(arena, 1)
    assert draw(arena, 2) is not None
    assert [snapshot.header.origin.step for snapshot in arena.snapshots()] == [1]
    take(arena, 3)
    assert [snapshot.header.origin.step for snapshot in arena.snapshots()] == [1, 3]


def test_what_is_said_of_a_snapshot_goes_with_it() -> None:
    """Digests and outcome are those of this very snapshot, never of the one that was in its slot before."""
    arena = Arena.create("a")
    for step in (1, 2):
        snapshot = take(arena, step, owed=False)
        assert snapshot is not None
        snapshot.add_digests(["x"] * len(snapshot.header.blocks))
        snapshot.settle(b"done")
    after = take(arena, 3)
    assert after is not None
    assert (after.digests, after.outcome) == (None, None)
    assert [snapshot.outcome for snapshot in arena.snapshots()] == [b"done", None]


def test_a_damaged_snapshot_is_offered_to_nobody() -> None:
    """It has its digests still, and is not held, has no sheet, is not told of, and nobody waits for its copy."""
    arena = Arena.create("a")
    for step in (1, 2):
        snapshot = take(arena, step, owed=False)
        assert snapshot is not None
        snapshot.add_digests(["x"] * len(snapshot.header.blocks))
    assert arena.words.is_being_copied
    snapshot.condemn()
    assert (snapshot.digests is not None, snapshot.is_whole, snapshot.is_held) == (True, True, False)
    assert [each.header.origin.step for each in arena.snapshots() if sheet_of(each)] == [1]
    assert arena.words.reached == {packed(1, 1)}
    assert not arena.words.is_being_copied
    after = take(arena, 3, owed=False)
    again = take(arena, 4, owed=False)  # into the slot of the damaged one
    assert after is not None
    assert again is not None
    assert not again.is_damaged


def test_a_header_with_a_flipped_bit_is_none() -> None:
    """A header whose bytes changed is not believed."""
    arena = Arena.create("a")
    snapshot = take(arena, 1)
    assert snapshot is not None
    arena.view(snapshot.slot, 0, 50)[49] ^= 4
    assert Arena.attach(arena_path(arena.descriptor)).snapshots() == []


def test_the_agent_can_ask_for_a_snapshot_to_be_saved() -> None:
    """One that was to stay in memory becomes owed when asked for; not one that was overwritten meanwhile."""
    arena = Arena.create("a")
    take(arena, 1, owed=False)
    assert not arena.words.is_in_debt
    (kept,) = arena.words.kept
    arena.words.ask(kept)
    (snapshot,) = arena.snapshots()
    assert snapshot.is_owed
    snapshot.settle(b"done")
    assert not arena.words.is_in_debt
    assert arena.words.kept == [replace(kept, is_settled=True)]
    for step in (2, 3):
        take(arena, step, owed=False)
    arena.words.ask(kept)
    assert not arena.words.is_in_debt


def test_ranks_that_died_in_the_middle_of_a_copy_owe_what_they_have_in_common() -> None:
    """One rank has published step 2, the other was killed while it copied it: step 1 is flushed, and there is room."""
    arenas = Arenas(2)
    ahead, behind = (Arena.attach(path) for path in arenas.own)
    for arena in (ahead, behind):
        take(arena, 1, owed=False)
    take(ahead, 2, owed=False)
    draw(behind, 2)
    assert arenas.reached(2) == (1, 1)
    assert arenas.reached(1) == (1, 2)
    for _ in range(2):
        arenas.flush(2)
        owed = [[each.header.origin.step for each in arena.snapshots() if each.is_owed] for arena in (ahead, behind)]
        assert owed == [[1], [1]]
    assert ahead.has_room
    assert behind.has_room
    ahead.words.committed = (1, 1)  # as its saver tells first
    for arena in (ahead, behind):
        arena.snapshots()[0].settle(b"done")
    arenas.flush(2)
    assert not arenas.are_in_debt
    arenas.close()


def test_what_did_not_add_up_with_other_workers_is_followed_by_the_step_before() -> None:
    """Both ranks here have step 2, one elsewhere has not: once its save was given up, step 1 is flushed."""
    arenas = Arenas(2)
    both = [Arena.attach(path) for path in arenas.own]
    for step in (1, 2):
        for arena in both:
            take(arena, step, owed=False)
    owed = []
    for _ in range(3):
        arenas.flush(2)
        owed.append([[each.header.origin.step for each in arena.snapshots() if each.is_owed] for arena in both])
        for arena in both:
            for snapshot in arena.snapshots():
                if snapshot.is_owed:
                    snapshot.settle(b"given up")
    assert owed == [[[2], [2]], [[1], [1]], [[], []]]
    arenas.close()


def test_the_newest_checkpoint_is_told_in_one_word() -> None:
    """Attempt and step of what was committed come back as they were written."""
    words = Arena.create("a").words
    assert words.committed == (0, -1)
    words.committed = (12, 3_000_000_000)
    assert words.committed == (12, 3_000_000_000)
