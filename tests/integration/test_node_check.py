"""The check of a machine by a real agent: real figures, bounded in time, and only while no ranks run."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import aiohttp
import pytest
import torch

from agents_real import STEPS, an_agent, at_step, launched, warm
from mend.orders import WAY_FIGURE, Ack, Check, Checked, Stop
from mend.protocol import BULK_PATH
from mend_trainer.checking import check
from mend_trainer.kernel import Reaper
from mend_trainer.nodecheck import adds_up

pytestmark = pytest.mark.asyncio
FIGURES = {"cpu matrix product", "cpu memory pass", "loopback"}
SECONDS = 100.0  # it takes a few; machines that test are busy


async def test_an_idle_agent_tells_what_its_machine_can_do(tmp_path: Path) -> None:
    """Figures above zero for processor, memory and loopback; asked twice at once, it measures once."""
    async with an_agent(["python", STEPS], tmp_path) as client:
        await warm(client)
        answers = await asyncio.gather(*(client.order(Check(attempt=7, seconds=SECONDS)) for _ in range(2)))
        (status, told), (_, again) = answers
        assert status == 200
        assert isinstance(told, Checked), told
        assert (told.attempt, told.worker, told.problem) == (7, 0, "")
        assert set(told.figures) == (FIGURES if not torch.cuda.is_available() else set(told.figures))
        assert all(figure > 0 for figure in told.figures.values())
        assert again == told


async def test_ranks_that_train_are_not_disturbed(tmp_path: Path) -> None:
    """While ranks run a check is refused; once they were stopped it is made."""
    async with an_agent(["python", STEPS], tmp_path) as client:
        await warm(client)
        await launched(client, 1)
        await client.until(at_step(1, 1))
        _, refused = await client.order(Check(attempt=2))
        assert isinstance(refused, Ack)
        assert (refused.accepted, refused.reason) == (False, "ranks are running here")
        await client.order(Stop(attempt=1))
        await client.until(lambda beat: not any(rank.exit is None for rank in beat.ranks))
        _, told = await client.order(Check(attempt=2, seconds=SECONDS))
        assert isinstance(told, Checked), told
        assert told.problem == ""


async def test_the_way_to_a_neighbour_is_measured(tmp_path: Path) -> None:
    """From an agent beside it, with the run's token; one that is gone, or has ranks at work, says nothing of it."""
    async with (
        an_agent(["python", STEPS], tmp_path) as mine,
        an_agent(["python", STEPS], tmp_path, worker=1) as beside,
    ):
        await warm(mine)
        await warm(beside)
        here = (beside.agent.url,)
        _, told = await mine.order(Check(attempt=1, seconds=SECONDS, neighbours=("http://127.0.0.1:9", *here)))
        assert isinstance(told, Checked), told
        assert (told.problem, told.figures[WAY_FIGURE] > 0) == ("", True)
        await launched(beside, 1)
        await beside.until(at_step(1, 1))
        _, told = await mine.order(Check(attempt=2, seconds=SECONDS, neighbours=here))
        assert isinstance(told, Checked), told
        assert WAY_FIGURE not in told.figures
        async with aiohttp.ClientSession() as stranger, stranger.get(beside.agent.url + BULK_PATH) as answer:
            assert answer.status == 401


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import time; time.sleep(1000)", "did not end within 1 s"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import sys; sys.exit('CUDA error: uncorrectable ECC error')", "died with exit code 1: CUDA error: unc"),
        ("import sys; print('hello'); sys.exit(0)", "said nothing that can be understood"),
    ],
    ids=["hangs", "is killed", "dies", "babbles"],
)
async def test_a_check_that_goes_wrong_is_a_finding(tmp_path: Path, program: str, problem: str) -> None:
    """A machine on which the check hangs, dies or talks nonsense is told so in words, in time, and nothing is left."""
    (tmp_path / "torch.py").write_text(program)  # what the check imports first
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    reaper = Reaper(asyncio.get_running_loop())
    seconds = 1.0 if "sleep" in program else SECONDS
    try:
        told = await check(Check(attempt=1, seconds=seconds), 3, environment, reaper)
        assert (told.worker, told.figures) == (3, {})
        assert told.problem.startswith(problem), told.problem
        assert await reaper.all_buried(SECONDS)
    finally:
        reaper.close()


async def test_a_wrong_number_is_seen() -> None:
    """One element of a product that is off by one is enough."""
    left, right = torch.arange(64).reshape(8, 8) % 7, torch.arange(64).reshape(8, 8) % 5
    product = (left @ right).float()
    assert adds_up(product, left, right)
    product[3, 5] += 1
    assert not adds_up(product, left, right)
