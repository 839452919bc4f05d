"""Whether a saver hangs, by what its agent sees: turns and moves count; an agent that was frozen has seen nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mend.store import Data
from mend.store.files import FileStore
from mend.store.views import SLICE_BYTES, Body
from mend_trainer.arenas import Arenas
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.saver import Saver
from mend_trainer.stillness import MOVE_SECONDS, TURN_SECONDS, Signs, Stillness
from snapshots_made import a_snapshot
from waiting import wait_until


def looked(stillness: Stillness, seconds: float, signs_at: Callable[[int], Signs]) -> Stillness:
    """After looks once a second; `signs_at` is told of how many there were."""
    for number in range(int(seconds)):
        stillness = stillness.seen(signs_at(number), 1.0)
    return stillness


def turning(number: int) -> Signs:
    """A saver with nothing to do."""
    return Signs(turns=number + 1)


def stuck(number: int) -> Signs:
    """One that does not turn any more."""
    return Signs(turns=7)


def waiting(number: int) -> Signs:
    """One that turns while what it owes does not move."""
    return Signs(turns=number + 1, is_in_debt=True)


def test_a_saver_that_turns_and_owes_nothing_never_hangs() -> None:
    """However long nothing moves."""
    assert looked(Stillness(), 10 * MOVE_SECONDS, turning).why_it_hangs == ""


def test_a_saver_whose_loop_stands_still_hangs() -> None:
    """After its time and not before; one turn begins it anew."""
    almost = looked(Stillness(), TURN_SECONDS, stuck)
    assert almost.why_it_hangs == ""
    assert almost.seen(stuck(0), 1.0).why_it_hangs == "its loop has not turned for 30s"
    assert looked(almost.seen(Signs(turns=8), 1.0), TURN_SECONDS, lambda _: Signs(turns=8)).turn_seconds == TURN_SECONDS
    assert almost.seen(Signs(turns=8), 1.0).turn_seconds == 0


def test_what_is_owed_and_does_not_move_is_a_hang_much_later() -> None:
    """A save that stands still though the loop turns is borne as long as a store that is away is asked."""
    assert looked(Stillness(), MOVE_SECONDS, waiting).why_it_hangs == ""
    assert "nothing that it owes has moved for 90" in looked(Stillness(), MOVE_SECONDS + 2, waiting).why_it_hangs


@pytest.mark.parametrize("pause", [60, 600])
def test_a_slow_store_is_no_hang(pause: int) -> None:
    """As long as now and then a request fails or some bytes go, for hours."""
    found = looked(
        Stillness(), 8 * MOVE_SECONDS, lambda number: Signs(turns=number, moves=number // pause, is_in_debt=True)
    )
    assert found.why_it_hangs == ""


def test_a_frozen_agent_has_seen_nothing() -> None:
    """Two looks that are an hour apart, since the whole pod stood still, say little about the saver."""
    stillness = looked(Stillness(), 3, stuck).seen(stuck(0), 3600.0)
    assert stillness.why_it_hangs == ""


def test_each_that_hung_is_followed_by_one_that_is_borne_for_longer() -> None:
    """Until a save is settled; a saver that died is followed by one that has the same time, and only its own."""
    stillness = looked(Stillness(), TURN_SECONDS + 2, stuck)
    again = looked(stillness.of_another(hung=True), TURN_SECONDS + 2, stuck)
    assert again.why_it_hangs == ""
    assert looked(again, TURN_SECONDS, stuck).why_it_hangs
    assert looked(stillness.of_another(hung=False), TURN_SECONDS - 2, stuck).why_it_hangs == ""
    settled = again.seen(Signs(turns=7, settled=4), 1.0)
    assert settled.why_it_hangs, "the same stillness, and now the usual time counts"
    many = stillness
    for _ in range(50):
        many = many.of_another(hung=True)
    assert looked(many, 32 * TURN_SECONDS + 2, stuck).why_it_hangs, "but never without end"


class Stuck(FileStore):
    """A folder that takes no object until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 5.0)
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def put(self, key: str, data: Data) -> str:
        """As the real one, later."""
        self.is_asked.set()
        self.go_on.wait()
        return super().put(key, data)


def test_a_saver_shows_that_it_turns_and_whether_what_it_owes_moves(tmp_path: Path) -> None:
    """Looks are turns, and blocks digested; a store that takes nothing is no move, and what it takes is."""
    arenas, store = Arenas(2), Stuck(tmp_path)
    saver = Saver([Arena.attach(path) for path in arenas.own], lambda said: None, lambda uri, endpoint: store)
    saver.look()
    a_snapshot(Arena.attach(arenas.own[1]), lengths=(5, 6, 7), world_size=1, digested=False)
    arenas.words[1].ask(arenas.words[1].kept[0])
    before = arenas.signs
    saver.look()
    assert arenas.signs.turns == before.turns + 4
    assert store.is_asked.wait(60)
    saver.look()
    held = arenas.signs
    assert held.is_in_debt
    saver.look()
    assert (arenas.signs.turns, arenas.signs.moves) == (held.turns + 1, held.moves)
    store.go_on.set()
    wait_until(lambda: not arenas.are_in_debt, "settled")
    saver.look()
    assert arenas.signs.moves > held.moves
    assert arenas.signs.settled > held.settled
    arenas.close()


def test_bytes_count_as_moved_before_their_request_ends(tmp_path: Path) -> None:
    """Slice by slice as the socket takes them over, and piece by piece as the disk does."""
    told: list[int] = []
    sending = Body([memoryview(bytes(2 * SLICE_BYTES + 5))], told.append).handed_over()
    next(sending)
    assert told == []
    next(sending)
    assert told == [SLICE_BYTES]
    assert len(list(sending)) == 1
    assert told == [SLICE_BYTES, SLICE_BYTES, 5]
    store = FileStore(tmp_path, 5.0)
    store.put("a", [b"12", b"345"])
    assert store.usage.handed_bytes == 5
