"""The sender of copies against real servers: what goes, what is skipped, what happens when the buddy is away."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from copies_worker import TOKEN, Worker, a_worker
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.copies.sender import Sender
from mend_trainer.copies.tls import read_run_tls
from mend_trainer.copies.wire import PIECE_BYTES
from run_secrets import run_pem
from snapshots_made import a_snapshot, contents
from waiting import eventually

MIB = 1 << 20


@pytest.fixture
def sender() -> Iterator[Sender]:
    """One that is closed afterwards."""
    made = Sender(read_run_tls(run_pem()), TOKEN)
    yield made
    made.close()


@pytest.fixture
def own() -> Arena:
    """The arena of the rank whose snapshots are sent."""
    return Arena.create("own")


def steps(worker: Worker) -> list[int]:
    """Of the copies that are held, the newest first."""
    return [held.step for held in worker.shelf.held()]


async def test_each_rank_has_its_newest_snapshot_at_the_buddy(sender: Sender) -> None:
    """Snapshots of all ranks are sent, and are at the buddy what they are here."""
    arenas = [Arena.create(f"rank-{rank}") for rank in range(2)]
    with a_worker() as worker:
        sender.follow(worker.url, 0)
        snapshots = [a_snapshot(arena, rank=rank) for rank, arena in enumerate(arenas)]
        for snapshot in snapshots:
            sender.offer(snapshot)
        await eventually(lambda: worker.shelf.held() and worker.shelf.held()[0].ranks == (0, 1), "both ranks held")
        assert [contents(worker.copy_of(rank)) for rank in range(2)] == [contents(each) for each in snapshots]


async def test_what_comes_during_a_transfer_is_skipped(sender: Sender) -> None:
    """A transfer that outlasts the interval is followed by the newest snapshot, not by those between."""
    first, *others = [  # each in an arena of its own, so that none overwrites another here
        a_snapshot(Arena.create(f"step-{step}"), step=step, lengths=(2 * MIB,)) for step in (10, 20, 30, 40)
    ]
    with a_worker() as worker:
        sender.follow(worker.url, MIB)
        sender.offer(first)
        await eventually(lambda: sender.sent_bytes, "the first is under way")
        for snapshot in others:
            sender.offer(snapshot)
        await eventually(lambda: 40 in steps(worker), "the newest is held")
        assert steps(worker) == [40, 10]
        await eventually(lambda: sender.sent == 2, "and no other was sent")


async def test_a_snapshot_that_is_overwritten_is_given_up(sender: Sender, own: Arena) -> None:
    """Once the rank writes to the slot again, the transfer ends, nothing of it is published, and the newest goes."""
    with a_worker() as worker:
        sender.follow(worker.url, 2 * MIB)
        sender.offer(a_snapshot(own, step=10, lengths=(2 * MIB,)))
        await eventually(lambda: sender.sent_bytes, "it is under way")
        a_snapshot(own, step=20, lengths=(2 * MIB,))
        sender.offer(a_snapshot(own, step=30, lengths=(100,)))
        await eventually(lambda: steps(worker) == [30], "only the newest is held")


async def test_a_buddy_that_is_away_is_tried_again(sender: Sender, own: Arena) -> None:
    """While nobody answers the snapshot is kept; a buddy that a new launch names gets the newest."""
    with a_worker() as gone:
        pass
    sender.follow(gone.url, 0)
    sender.offer(a_snapshot(own, step=10))
    await eventually(lambda: sender.trouble, "the trouble is known")
    assert "no copy can be sent to the buddy" in sender.trouble
    with a_worker() as worker:
        sender.follow(worker.url, 0)
        sender.offer(a_snapshot(own, step=20))
        await eventually(lambda: steps(worker) == [20], "the new buddy has it")
        await eventually(lambda: not sender.trouble, "and all is well")


@pytest.mark.parametrize("place", ["https://[::", "https://host:99999", "http://127.0.0.1:1", "nonsense"])
async def test_a_place_that_is_none_is_told(sender: Sender, own: Arena, place: str) -> None:
    """A buddy that cannot be is no buddy: nobody waits for it, and the next one gets copies."""
    sender.follow(place, 0)
    sender.offer(a_snapshot(own, step=10))
    await eventually(lambda: "no place of a saver" in sender.trouble, "the trouble is known")
    assert not own.words.is_being_copied
    with a_worker() as worker:
        sender.follow(worker.url, 0)
        sender.offer(a_snapshot(own, step=20))
        await eventually(lambda: steps(worker) == [20], "the new buddy has it")


async def test_a_transfer_ends_when_another_buddy_is_named(sender: Sender, own: Arena) -> None:
    """A new launch with another buddy does not wait for the slow one."""
    with a_worker() as slow, a_worker() as worker:
        sender.follow(slow.url, 1 << 10)
        sender.offer(a_snapshot(own, step=10))
        sender.follow(worker.url, 0)
        sender.offer(a_snapshot(own, step=20))
        await eventually(lambda: steps(worker) == [20], "the new buddy has it")
        assert steps(slow) == []


async def test_without_a_buddy_nothing_is_sent(sender: Sender, own: Arena) -> None:
    """A run of one worker keeps its snapshots to itself, and none is sent to whom a later launch names."""
    sender.offer(a_snapshot(own, step=10))
    with a_worker() as worker:
        sender.follow(worker.url, 0)
        sender.offer(a_snapshot(own, step=20))
        await eventually(lambda: steps(worker) == [20], "the one that was taken since")


async def test_a_refused_copy_holds_up_no_other(sender: Sender, own: Arena) -> None:
    """A copy that the buddy refuses is not tried again; the next snapshot is."""
    verdicts = ["no room"]
    with a_worker(room_for=lambda size: verdicts.pop() if verdicts else "") as worker:
        sender.follow(worker.url, 0)
        sender.offer(a_snapshot(own, step=10))
        await eventually(lambda: "no room" in sender.trouble, "it was refused in words")
        sender.offer(a_snapshot(own, step=20))
        await eventually(lambda: steps(worker) == [20], "the next is taken")


async def test_whoever_waits_for_the_copy_is_told(sender: Sender, own: Arena) -> None:
    """A snapshot is being copied until the buddy has it; then the rank may take another for memory alone."""
    with a_worker() as worker:
        sender.follow(worker.url, MIB)
        sender.offer(a_snapshot(own, step=10, lengths=(MIB,)))
        await eventually(lambda: sender.sent_bytes, "it is under way")
        assert own.words.is_being_copied
        await eventually(lambda: not own.words.is_being_copied, "it has arrived")
        assert steps(worker) == [10]


async def test_nobody_waits_for_a_buddy_that_is_away(sender: Sender, own: Arena) -> None:
    """Once a buddy does not answer, snapshots go on without copies, until it does."""
    with a_worker() as gone:
        pass
    sender.follow(gone.url, 0)
    sender.offer(a_snapshot(own, step=10))
    await eventually(lambda: not own.words.is_being_copied, "it was tried in vain")
    sender.offer(a_snapshot(own, step=20))
    assert not own.words.is_being_copied


async def test_the_cap_holds(sender: Sender, own: Arena) -> None:
    """At no moment more has gone than the cap allows since the transfer began."""
    rate = 2 * MIB
    with a_worker() as worker:
        sender.follow(worker.url, rate)
        began = time.monotonic()
        sender.offer(a_snapshot(own, lengths=(2 * MIB,)))
        seen: list[int] = []

        def is_done() -> bool:
            sent, elapsed = sender.sent_bytes, time.monotonic() - began
            seen.append(sent)
            assert sent <= rate * (elapsed + 0.1) + PIECE_BYTES
            return steps(worker) == [10]

        await eventually(is_done, "it is held")
    assert len(set(seen)) > 2, "it was looked at on the way"
