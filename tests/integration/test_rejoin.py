"""Ranks that stay when a peer is lost: real agents, the reference trainer, real kills; and not a bit is lost."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agents_real import AgentClient, a_launch, an_agent, at_step, has_exit, is_running, warm
from mend.heartbeats import AgentState, Heartbeat, Points
from mend.orders import CheckpointPlan
from mend.states import CheckpointRef
from mend.store import open_store
from mend_trainer.alone import next_attempt
from trainer_gang import a_little_text, digests_of, manifest_of, tiny_arguments

_STEPS = 400
_RANKS = 4  # the sum of two would not depend on their order


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text to train on."""
    return a_little_text(tmp_path_factory.mktemp("text"))


def a_trainer(text: Path) -> list[str]:
    """The command of a rank."""
    return ["python", "-m", "mend_trainer.train", *tiny_arguments(text, steps=_STEPS)]


class Run:
    """A run on one real agent, whose attempts the test begins as a controller would."""

    def __init__(self, client: AgentClient, plan: CheckpointPlan) -> None:
        self.client = client
        self.plan = plan
        self.attempt = 0

    async def launch(self, keep: Sequence[int] = (), restore: Sequence[CheckpointRef] | None = None) -> None:
        """The next attempt, from what is committed unless told otherwise."""
        self.attempt += 1
        if restore is None:
            _, restore = next_attempt(open_store(self.plan.uri))
        order = msgspec.structs.replace(
            a_launch(self.attempt, self.client),
            checkpoint=self.plan,
            restore=tuple(restore),
            keep=tuple(keep),
            follows=self.attempt - 1,
            run_uid="uid",
        )
        status, answer = await self.client.order(order)
        assert status == 200, answer

    async def at(self, step: int) -> Heartbeat:
        """Every rank has completed the step in the present attempt, in which it has done some."""
        holds = at_step(step, self.attempt)
        return await self.client.until(
            lambda beat: holds(beat) and all(rank.steps_done for rank in beat.ranks), f"step {step} of {self.attempt}"
        )

    async def finished(self) -> Heartbeat:
        """All ranks have succeeded."""
        return await self.client.until(lambda beat: beat.state is AgentState.FINISHED, "the end")

    def losses(self) -> dict[int, set[float | None]]:
        """Every loss that any attempt told of a step."""
        found: dict[int, set[float | None]] = {}
        for _, line in self.client.lines:
            for point in line.points if isinstance(line, Points) else ():
                found.setdefault(point.step, set()).add(point.loss)
        return found

    def last_manifest(self, beat: Heartbeat) -> object:
        """Digests of the final state."""
        assert beat.save is not None
        assert beat.save.committed is not None
        return digests_of(manifest_of(self.plan, beat.save.committed))


@asynccontextmanager
async def a_run(command: list[str], folder: Path) -> AsyncIterator[Run]:
    """A warm agent, and nothing launched yet."""
    plan = CheckpointPlan(uri=f"file://{folder}/store", interval_steps=25)
    async with an_agent(command, folder, ranks=_RANKS, env={"GLOO_SOCKET_IFNAME": "lo"}) as client:
        await warm(client)
        yield Run(client, plan)


def footings_of(pid: int) -> set[Path]:
    """The files in which this rank keeps its footing."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]) for line in maps if line.endswith(".footing")}


def stayed(before: Heartbeat, after: Heartbeat, run: Run) -> set[int]:
    """Ranks that have kept their process; one may not have, if the agent saw that gloo had lost the error for it."""
    old, new = pids(before), pids(after)
    kept = {rank for rank in old if old[rank] == new[rank]}
    stuck = {
        int(found)
        for found in re.findall(rf"attempt {run.attempt}: rank (\d+) does not rejoin", run.client.agent.output)
    }
    assert len(stuck) <= 1
    return kept | stuck


def pids(beat: Heartbeat) -> dict[int, int]:
    """Process of each rank."""
    return {rank.rank: rank.pid for rank in beat.ranks}


async def test_survivors_keep_their_processes_and_nothing_is_lost(text: Path, tmp_path: Path) -> None:
    """One rank after the other is killed, rank 0 too; the others stay, no step is done twice, and the curve and the
    final weights equal those of a run to which nothing happened, bit for bit."""
    command = a_trainer(text)
    calm_folder, hit_folder = tmp_path / "calm", tmp_path / "hit"
    calm_folder.mkdir()
    hit_folder.mkdir()
    async with a_run(command, calm_folder) as calm:
        await calm.launch()
        unbroken = calm.last_manifest(await calm.finished())
        curve = calm.losses()
    assert set(curve) == set(range(_STEPS))
    async with a_run(command, hit_folder) as run:
        await run.launch()
        beat = await run.at(40)
        for victim in (2, 0, 3):
            before = beat
            os.kill(pids(before)[victim], signal.SIGKILL)
            beat = await run.client.until(has_exit(victim, run.attempt))
            step = max(rank.step for rank in beat.ranks)
            await run.launch(keep=[rank for rank in range(_RANKS) if rank != victim])
            beat = await run.at(step + 20)
            assert stayed(before, beat, run) == set(range(_RANKS)) - {victim}
            assert beat.restored is not None
            assert beat.restored.is_of_peers
            assert step - 1 <= beat.restored.step <= step + 1
            await warm(run.client)
        assert run.last_manifest(await run.finished()) == unbroken
        assert {step: found for step, found in run.losses().items() if found != curve[step]} == {}


def trains_in(attempt: int) -> Callable[[Heartbeat], bool]:
    """The first rank has made some steps in this attempt."""
    return lambda beat: beat.attempt == attempt and beat.ranks[0].steps_done > 5


async def test_a_worker_that_keeps_nobody_still_has_what_its_rank_left(text: Path, tmp_path: Path) -> None:
    """With one rank per worker the lost one's agent keeps nobody; the state is handed on in memory all the same.

    Now and then gloo leaves a survivor in a message of which it has read half, and it is replaced (decision 0008).
    """
    plan = CheckpointPlan(uri=f"file://{tmp_path}/store", interval_steps=25)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                an_agent(a_trainer(text), tmp_path, worker=n, ranks=1, env={"GLOO_SOCKET_IFNAME": "lo"})
            )
            for n in range(2)
        ]
        for client in clients:
            await warm(client)

        async def launch(attempt: int, **more: Any) -> None:
            for n, client in enumerate(clients):
                order = a_launch(attempt, clients[0], workers=2, worker=n)
                status, _ = await client.order(msgspec.structs.replace(order, checkpoint=plan, run_uid="uid", **more))
                assert status == 200

        await launch(1)
        for attempt in range(2, 6):
            here, victim = [await client.until(at_step(30, attempt - 1), "step 30") for client in clients]
            os.kill(victim.ranks[0].pid, signal.SIGKILL)
            await clients[1].until(has_exit(1, attempt - 1))
            _, restore = next_attempt(open_store(plan.uri))
            await launch(attempt, keep=(0,), follows=attempt - 1, restore=restore)
            beat = await clients[0].until(trains_in(attempt), f"attempt {attempt}")
            assert beat.restored is not None
            if beat.ranks[0].pid == here.ranks[0].pid:
                break
        else:
            pytest.fail(f"the survivor was replaced each time:\n{clients[0].agent.output[-5000:]}")
        assert beat.restored.is_of_peers, clients[0].agent.output[-5000:]


async def test_a_stopped_rank_is_killed_and_replaced(text: Path, tmp_path: Path) -> None:
    """Survivors that wait in a collective for a stopped rank, and hear nothing of it, are called off by the order."""
    async with a_run(a_trainer(text), tmp_path) as run:
        await run.launch()
        beat = await run.at(30)
        os.kill(pids(beat)[1], signal.SIGSTOP)
        await run.client.until(lambda beat: min(rank.progress_seconds for rank in beat.ranks) > 0.3, "a hang")
        await run.launch(keep=[0, 2, 3])
        assert stayed(beat, await run.at(40), run) == {0, 2, 3}
        assert not is_running(pids(beat)[1])


async def test_a_rank_that_does_not_come_is_replaced_too(text: Path, tmp_path: Path) -> None:
    """A survivor that is stuck outside any collective cannot hear the order: its place is taken as well."""
    async with a_run(a_trainer(text), tmp_path) as run:
        await run.launch()
        before = pids(await run.at(30))
        os.kill(before[1], signal.SIGKILL)
        os.kill(before[3], signal.SIGSTOP)
        await run.client.until(has_exit(1))
        await run.launch(keep=[0, 2, 3])
        after = pids(await run.at(40))
        assert {rank for rank in before if before[rank] == after[rank]} == {0, 2}


async def test_without_the_footing_of_the_lost_rank_a_checkpoint_is_restored(text: Path, tmp_path: Path) -> None:
    """If the generators of the lost rank are lost as well, all go on from the newest checkpoint, still in place."""
    async with a_run(a_trainer(text), tmp_path) as run:
        await run.launch()
        before = await run.at(30)
        os.kill(pids(before)[1], signal.SIGKILL)
        for footing in footings_of(pids(before)[0]):
            footing.with_name("rank-1.footing").unlink()
        await run.client.until(has_exit(1))
        await run.launch(keep=[0, 2, 3])
        beat = await run.at(40)
        assert stayed(before, beat, run) == {0, 2, 3}
        assert beat.restored is not None
        assert beat.restored.uri.startswith(run.plan.uri)


async def test_all_that_are_left_tell_that_they_were_cut_off(text: Path, tmp_path: Path) -> None:
    """Also a rank whose neighbours both live hears of the loss, since each that hears of it breaks off; all wait."""
    async with a_run(a_trainer(text), tmp_path) as run:
        await run.launch()
        before = pids(await run.at(30))
        os.kill(before[1], signal.SIGKILL)
        await run.client.until(has_exit(1))
        beat = await run.client.until(lambda beat: all(each.error for each in beat.ranks if each.rank != 1), "cut off")
        assert all(each.exit is None and each.can_rejoin for each in beat.ranks if each.rank != 1)


async def test_an_order_before_the_first_step_starts_everybody_anew(text: Path, tmp_path: Path) -> None:
    """Ranks that have not yet entered their loop do not offer to rejoin, and are replaced whatever the order says."""
    async with a_run(a_trainer(text), tmp_path) as run:
        await run.launch()
        await run.client.until(lambda beat: len(beat.ranks) == _RANKS and all(rank.pid for rank in beat.ranks))
        assert run.client.heartbeat is not None
        before = pids(run.client.heartbeat)
        await run.launch(keep=range(_RANKS))
        after = pids(await run.at(10))
        assert not set(before.values()) & set(after.values())
