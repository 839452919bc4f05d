"""Steps that have to be done again after a rank, a worker, or all workers are lost; real agents, savers and ranks."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import with_tests  # noqa: F401
from figures import Row, not_built, row

from s3 import ministack
from saving_gang import SavingGang, a_saving_gang

INTERVAL_STEPS = 20
STEP_SECONDS = 0.1
MOST_SECONDS = 3.0  # the moment of the loss, drawn from as much


async def rows(rounds: int, tell: Callable[[], object]) -> list[Row]:
    """The three figures: the worst of so many losses each."""
    with tempfile.TemporaryDirectory(prefix="mb-", ignore_cleanup_errors=True) as folder, ministack(Path(folder)) as s3:
        (Path(folder) / "a").mkdir()
        async with a_saving_gang(
            Path(folder) / "a", s3, prefix="a", workers=1, ranks=2, pace_seconds=STEP_SECONDS
        ) as gang:
            rank = [await lost(gang, n, lambda: gang.kill(gang.pid_of(1)), tell, in_memory=True) for n in range(rounds)]
        (Path(folder) / "b").mkdir()
        async with a_saving_gang(
            Path(folder) / "b", s3, prefix="b", workers=2, ranks=1, pace_seconds=STEP_SECONDS
        ) as gang:
            worker = None
            if all(view.heartbeat and view.heartbeat.saver_port for view in gang.views()):
                worker = [await lost(gang, n, lambda: gang.kill_agent(1), tell, in_memory=True) for n in range(rounds)]
            everybody = [await lost(gang, n, lambda: _all(gang), tell, in_memory=False) for n in range(rounds)]
    what = f"steps of {STEP_SECONDS:g} s, a save every {INTERVAL_STEPS} steps, a snapshot in memory every step"
    figure = "steps lost: a worker is lost, its snapshots are with its peer"
    return [
        row("steps lost: a rank is killed", rank, 1.0, unit="", of=1.0, note=f"worst; {what}"),
        not_built(figure, 1.0, unit="", what="copies of snapshots with peers")
        if worker is None
        else row(figure, worker, 1.0, unit="", of=1.0, note=f"worst; {what}"),
        row("steps lost: all workers are lost", everybody, INTERVAL_STEPS, unit="", of=1.0, note=f"worst; {what}"),
    ]


def _all(gang: SavingGang) -> None:
    for worker in range(gang.workers):
        gang.kill_agent(worker)


async def lost(
    gang: SavingGang, number: int, strike: Callable[[], object], tell: Callable[[], object], *, in_memory: bool
) -> float:
    """Train for a while under the plan that is measured, strike, and count what the next attempt does again."""
    gang.save_every_steps, gang.memory_interval_steps = INTERVAL_STEPS, 1
    await gang.back(in_memory=False)
    await asyncio.sleep(random.Random(f"{strike}/{number}").uniform(0.2, MOST_SECONDS))
    await asyncio.to_thread(strike)
    broken = await gang.back(in_memory=in_memory)
    assert not broken, broken
    history, attempt = gang.history(), gang.attempt
    base = history.base(attempt)
    assert base is not None
    tell()
    return float(history.last_step(base) - min(note.step for note in history.restored(attempt).values()))
