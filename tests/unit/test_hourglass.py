"""An hourglass: something has held for so long, or it begins anew."""

from __future__ import annotations

import asyncio

from mend_trainer.hourglass import Hourglass


async def test_what_holds_for_long_enough_is_told_once() -> None:
    """However often it is said meanwhile that it holds."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    glass = Hourglass(loop, 0.01, told.set)
    for _ in range(3):
        glass.see(True)
    assert not glass.has_ended
    await asyncio.wait_for(told.wait(), 10)
    assert glass.has_ended
    told.clear()
    glass.see(True)
    glass.see(False)
    assert not glass.has_ended
    assert not told.is_set()


async def test_a_break_begins_it_anew() -> None:
    """What was turned over a moment before would else be told at once; one that began later overtakes it."""
    loop, ended = asyncio.get_running_loop(), []
    broken = Hourglass(loop, 0.05, lambda: ended.append("broken"))
    broken.see(True)
    other_done = asyncio.Event()

    def others() -> None:
        ended.append("other")
        other_done.set()

    broken.see(False)
    Hourglass(loop, 0.06, others).see(True)
    await asyncio.wait_for(other_done.wait(), 10)
    assert ended == ["other"]
    done = asyncio.Event()
    again = Hourglass(loop, 0.01, done.set)
    again.see(True)
    again.see(False)
    again.see(True)
    await asyncio.wait_for(done.wait(), 10)
