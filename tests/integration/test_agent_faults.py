"""What an agent sees of ranks that crash and hang: real processes, real gloo, real signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agents_real import STEPS, AgentClient, an_agent, at_step, has_exit, is_running, launched, named, warm
from mend.evidence import Evidence, RankEvidence
from mend.heartbeats import Heartbeat, Phase, RankReport

pytestmark = pytest.mark.asyncio(loop_scope="module")

RANKS = 2


class Worker:
    """One agent for all tests of this module: each takes the next attempt, as a run that recovers would."""

    def __init__(self, client: AgentClient) -> None:
        self.client = client
        self.attempt = 0

    async def launch(self, **env: str) -> None:
        """The next attempt."""
        self.attempt += 1
        await launched(self.client, self.attempt, **env)

    async def training(self, step: int = 2) -> Heartbeat:
        """Every rank is past `step`."""
        return await self.client.until(at_step(step, self.attempt), f"step {step}")

    async def ended(self, rank: int) -> RankReport:
        """The rank, once it has ended."""
        beat = await self.client.until(has_exit(rank, self.attempt), f"end of rank {rank}")
        return beat.ranks[rank]

    async def stuck(self) -> Evidence:
        """Evidence, once no rank has made progress for a while."""
        await self.client.until(
            lambda beat: beat.attempt == self.attempt and min(each.progress_seconds for each in beat.ranks) > 0.5,
            "no progress",
        )
        return await self.client.gather(self.attempt)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Worker]:
    """A warm agent of two ranks."""
    async with an_agent(["python", STEPS], tmp_path_factory.mktemp("agent"), ranks=RANKS) as client:
        await warm(client)
        yield Worker(client)


@pytest.fixture(scope="module")
def gil_holder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A C library whose only function never returns, built here."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (gcc or cc) to hold the GIL from C")
    library = tmp_path_factory.mktemp("c") / "gil_holder.so"
    source = Path(STEPS).with_name("gil_holder.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def enqueued(rank: RankEvidence) -> int:
    """The last collective that the rank has begun on the default group."""
    assert rank.recorder_answered, rank
    return next(group.last_enqueued for group in rank.groups if group.name.startswith("0:"))


async def test_a_killed_rank_is_told_with_its_signal(worker: Worker) -> None:
    """kill -9 of a rank shows as signal 9 of that rank; its neighbour raises and says why."""
    await worker.launch()
    beat = await worker.training()
    os.kill(beat.ranks[1].pid, signal.SIGKILL)
    killed = await worker.ended(1)
    assert killed.exit is not None
    assert (killed.exit.signal, killed.exit.code, killed.error) == (9, None, None)
    survivor = await worker.ended(0)
    assert survivor.exit is not None
    assert survivor.exit.code == 1
    assert survivor.error is not None
    assert "gloo" in survivor.error.message


async def test_an_exception_arrives_with_its_traceback(worker: Worker) -> None:
    """A rank that raises is told with type, message and the user's own frames, and exits with 1."""
    await worker.launch(FAULT="raise", FAULT_RANK="1")
    raised = await worker.ended(1)
    assert raised.exit is not None
    assert raised.error is not None
    assert raised.exit.code == 1
    assert (raised.error.type, raised.error.message) == ("RuntimeError", "the loss went through the roof")
    assert "steps.py" in raised.error.traceback
    assert "mend_trainer" not in raised.error.traceback
    assert not raised.error.fatal
    assert any("the loss went through the roof" in line for line in raised.exit.log_tail)


async def test_an_exception_that_trying_again_cannot_help_is_fatal(worker: Worker) -> None:
    """An exception with `mend_fatal` is told as fatal."""
    await worker.launch(FAULT="fatal")
    raised = await worker.ended(0)
    assert raised.error is not None
    assert (raised.error.type, raised.error.fatal) == ("Misfit", True)


async def test_the_code_of_sys_exit_is_kept(worker: Worker) -> None:
    """sys.exit(3) is exit code 3 and no exception."""
    await worker.launch(FAULT="exit")
    left = await worker.ended(0)
    assert left.exit is not None
    assert (left.exit.code, left.error) == (3, None)


async def test_a_stopped_rank_shows_as_stopped_and_the_others_as_waiting(worker: Worker) -> None:
    """SIGSTOP: /proc says T and the recorder is silent; the other rank waits in a collective and says in which."""
    await worker.launch()
    beat = await worker.training()
    os.kill(beat.ranks[1].pid, signal.SIGSTOP)
    waiting, stopped = (await worker.stuck()).ranks
    assert (stopped.process_state, stopped.recorder_answered, stopped.stack) == ("T", False, "")
    assert waiting.process_state in "RS"
    assert waiting.phase is Phase.COLLECTIVE
    assert enqueued(waiting) > waiting.groups[0].last_completed
    assert waiting.groups[0].last_enqueued_name == "gloo:all_reduce"
    assert "all_reduce" in waiting.stack
    await worker.launch()
    await worker.training()
    assert not is_running(beat.ranks[1].pid)


async def test_a_held_gil_hides_nothing(worker: Worker, gil_holder: str) -> None:
    """While C code holds the GIL for ever, counters, phase and the Python stack of that rank can still be read."""
    await worker.launch(FAULT="hold-gil", FAULT_RANK="1", GIL_HOLDER=gil_holder)
    waiting, holder = (await worker.stuck()).ranks
    assert holder.phase is Phase.STEP
    assert enqueued(holder) == enqueued(waiting) - 1
    assert "in fail" in holder.stack
    assert (holder.python_answers, waiting.python_answers) == (False, True)
    assert "all_reduce" in waiting.stack


async def test_a_skipped_collective_shows_as_a_lag(worker: Worker) -> None:
    """A rank that left out one all_reduce ends one behind the rank that waits for it."""
    await worker.launch(FAULT="skip", FAULT_RANK="1", STEPS="10")
    waiting, skipper = (await worker.stuck()).ranks
    assert enqueued(skipper) == enqueued(waiting) - 1
    assert waiting.phase is Phase.COLLECTIVE
    assert skipper.step == 9


async def test_a_full_recorder_can_still_be_read(worker: Worker) -> None:
    """After thousands of collectives, when the ring of entries is full, the counters tell as they did at first."""
    await worker.launch(FAULT="skip", FAULT_RANK="1", FAULT_STEP="2500", STEPS="2600", STEP_SECONDS="0")
    waiting, skipper = (await worker.stuck()).ranks
    assert waiting.recorder_answered
    assert skipper.recorder_answered
    assert enqueued(waiting) > 2500
    assert enqueued(skipper) == enqueued(waiting) - 1


async def test_gathering_disturbs_nobody(worker: Worker) -> None:
    """Evidence of a healthy gang can be taken again and again while it trains on."""
    await worker.launch()
    await worker.training()
    for _ in range(3):
        evidence = await worker.client.gather(worker.attempt)
        assert all(rank.recorder_answered and rank.stack for rank in evidence.ranks)
    beat = await worker.training(step=evidence.ranks[0].step + 3)
    assert all(rank.exit is None for rank in beat.ranks)


async def test_a_flood_of_lines_stops_nothing(worker: Worker) -> None:
    """300,000 lines at once: the ranks go on, the agent answers, and what was skipped is counted."""
    await worker.launch(FAULT="flood")
    await worker.training(step=6)
    evidence = await worker.client.gather(worker.attempt)
    assert evidence.ranks[0].log_tail[-1].startswith("flood 299999")
    assert len(worker.client.agent.output) < 30_000_000


async def test_ranks_start_cold_while_the_zygote_is_dead(worker: Worker) -> None:
    """kill -9 of the zygote and its standbys: the ranks train on, the next launch works, standbys come back."""
    client, agent = worker.client, worker.client.agent
    await worker.launch()
    await worker.training()
    await warm(client)
    for pid in named(agent, "mend-zygote") + named(agent, "mend-standby"):
        os.kill(pid, signal.SIGKILL)
    beat = await client.until(lambda beat: beat.standbys_ready == 0)
    beat = await worker.training(beat.ranks[0].step + 3)
    assert all(rank.exit is None for rank in beat.ranks)
    await worker.launch()
    await worker.training()
    await warm(client)
    # The new zygote imported politely, at idle priority if it may; a rank must not inherit that.
    assert {os.sched_getscheduler(pid) for pid in named(agent, "mend-standby")} == {os.SCHED_OTHER}


async def test_a_dead_keeper_of_stores_is_replaced(worker: Worker) -> None:
    """kill -9 of the keeper: running ranks need it no more, a new one is told, and the next attempt meets there."""
    await worker.launch()
    before = await worker.training()
    os.kill(named(worker.client.agent, "mend-stores")[0], signal.SIGKILL)
    after = await worker.client.until(lambda beat: beat.store_port not in (0, before.store_port))
    after = await worker.training(after.ranks[0].step + 3)
    assert all(rank.exit is None for rank in after.ranks)
    await worker.launch()
    await worker.training()
