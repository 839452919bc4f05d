"""How the ranks of a gang are ended: after a save if there is time, else at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from mend_trainer.arenas import Arenas
from mend_trainer.gang import Gang
from mend_trainer.ranks import Rank

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.02  # a page is memory: looking at it costs microseconds, and there is nothing to wait on
_GOODBYE_SECONDS: Final = 1.0  # between SIGTERM and SIGKILL, once the state is saved


async def save_and_end(gang: Gang, seconds: float, arenas: Arenas, wake: Callable[[], None]) -> bool:
    """Ask for a save, wait for it to be committed, then end the ranks, all within `seconds`; whether it was saved.

    Ranks that are gone, or do not come to the end of their step within half of that time, cannot save any more: then
    the newest snapshots that they have in common are saved instead, if they are not yet.
    """
    began = time.monotonic()
    deadline = began + seconds

    def flush() -> None:
        arenas.flush(gang.launch.ranks)
        wake()

    saved = await _save(gang, deadline, began + seconds / 2, flush)
    gang.terminate()
    # Ranks that never completed a step have no state to lose, or know nothing of mend: SIGTERM is what they were told.
    goodbye = min(deadline, time.monotonic() + _GOODBYE_SECONDS) if saved else deadline
    await _wait_until(lambda: not gang.alive, goodbye)
    gang.kill()
    if not saved:
        flush()
    if arenas.are_in_debt and not await _wait_until(lambda: not arenas.are_in_debt, deadline):
        log.warning("attempt %d: a snapshot was not saved in time", gang.launch.attempt)
    return saved


async def _save(gang: Gang, deadline: float, patient_until: float, flush: Callable[[], None]) -> bool:
    wanted: dict[Rank, int] = {}
    for rank in gang.alive:
        if rank.rejoins_since is not None:
            continue  # it has no state of its own yet
        step = rank.progress().step
        rank.request_save()
        if step >= 0:
            wanted[rank] = step
    if not wanted:
        return False

    def committed() -> bool:
        return all(gang.committed_step(rank) >= step for rank, step in wanted.items())

    margin = min(_GOODBYE_SECONDS, max(0.0, deadline - time.monotonic()) / 2)
    if not await _wait_until(lambda: committed() or not gang.alive, min(patient_until, deadline - margin)):
        flush()
        await _wait_until(lambda: committed() or not gang.alive, deadline - margin)
    if saved := committed():
        step = max(gang.committed_step(rank) for rank in wanted)
        log.info("attempt %d: saved at step %d", gang.launch.attempt, step)
    else:
        log.warning("attempt %d: no save was committed", gang.launch.attempt)
    return saved


async def _wait_until(holds: Callable[[], bool], deadline: float) -> bool:
    while not holds():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True
