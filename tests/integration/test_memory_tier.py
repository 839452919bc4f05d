"""A worker's memory as a place to go on from: real agents, real kills, and a store that is not needed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from agents_real import AgentClient, has_exit
from memory_cgroup import limited_memory
from mend.heartbeats import AgentState, Heartbeat, Points
from mend.orders import CheckpointPlan, Stop
from mend.states import CheckpointRef, Held
from mend.store import open_store
from mend_trainer.alone import next_attempt
from mend_trainer.procfs import GONE, look_at
from saving_worker import a_worker, launch, pid_of_saver


def whole(beat: Heartbeat, step: int = 0) -> Held | None:
    """The newest save of which this worker has both ranks' snapshots, if it is of that step or later."""
    found = [held for held in beat.held if held.ranks == (0, 1) and held.step >= step]
    return max(found, key=lambda held: held.step, default=None)


def in_memory(held: Held) -> CheckpointRef:
    """The candidate that the controller makes of it."""
    return CheckpointRef(uri=f"memory:{held.save_id}", step=held.step, attempt=held.attempt)


def losses(client: AgentClient) -> dict[int, set[float | None]]:
    """Every loss that any attempt told of a step."""
    found: dict[int, set[float | None]] = {}
    for _, line in client.lines:
        for point in line.points if isinstance(line, Points) else ():
            found.setdefault(point.step, set()).add(point.loss)
    return found


def pid_of(beat: Heartbeat, rank: int) -> int:
    """Process of a rank."""
    return next(each.pid for each in beat.ranks if each.rank == rank)


async def test_a_killed_rank_goes_on_from_memory_without_the_store(tmp_path: Path) -> None:
    """With no store to read from, ranks that are started anew go on after the snapshot of the ranks before, exactly."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/away/run", memory_interval_steps=5)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: whole(beat, 20), "a snapshot in memory")
        os.kill(pid_of(beat, 1), signal.SIGKILL)
        beat = await client.until(has_exit(1, 1))
        held = whole(beat)
        assert held is not None
        await launch(client, 2, plan, in_memory(held))
        beat = await client.until(lambda beat: beat.restored is not None and beat.attempt == 2, "restored")
        assert beat.restored == in_memory(held)
        newer = await client.until(lambda beat: whole(beat, held.step + 20), "a snapshot of the second attempt")
        found = whole(newer)
        assert found is not None
        assert [(link.attempt, link.step) for link in found.lineage] == [(1, held.step)]
        told = losses(client)
        assert all(len(told[step]) == 1 for step in told), "the steps done twice had the same losses"
        assert not (tmp_path / "away").exists()


async def test_a_snapshot_without_digests_is_told_as_pending_until_it_has_them(tmp_path: Path) -> None:
    """With a saver that stands still what ranks publish, and leave behind, is pending; once it goes on, it is held."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/away/run", memory_interval_steps=5)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: whole(beat, 20), "a snapshot in memory")
        saver = pid_of_saver(client.agent.pid)
        assert saver is not None
        os.kill(saver, signal.SIGSTOP)
        last = whole(beat)
        assert last is not None
        beat = await client.until(lambda beat: beat.pending and beat.pending.step > last.step + 10, "a pending one")
        for rank in (0, 1):
            os.kill(pid_of(beat, rank), signal.SIGKILL)
        await client.until(has_exit(0, 1))
        beat = await client.until(has_exit(1, 1))
        left = beat.pending
        assert left is not None
        assert (left.attempt, left.world_size, left.ranks) == (1, 2, (0, 1))
        assert left.step_seconds > 0
        assert not whole(beat, left.step)
        os.kill(saver, signal.SIGCONT)
        beat = await client.until(lambda beat: whole(beat, left.step), "held")
        assert beat.pending is None
        held = whole(beat, left.step)
        assert held is not None
        await launch(client, 2, plan, in_memory(held))
        beat = await client.until(lambda beat: beat.restored is not None and beat.attempt == 2, "restored")
        assert beat.restored is not None
        assert beat.restored.step == left.step


async def test_a_snapshot_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    """A candidate in memory that no worker has any more is passed over for the checkpoint, and nothing is marked."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=20)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: beat.save is not None and beat.save.committed, "a checkpoint")
        os.kill(pid_of(beat, 0), signal.SIGKILL)
        await client.until(has_exit(0, 1))
        _, saved = next_attempt(open_store(plan.uri))
        gone = CheckpointRef(uri="memory:feedfeedfeedfeed", step=1000, attempt=1)
        await launch(client, 2, plan, gone, *saved)
        beat = await client.until(lambda beat: beat.restored is not None and beat.attempt == 2, "restored")
        assert beat.restored == saved[0]
        assert beat.quarantined == ()


async def test_a_killed_saver_is_followed_by_another(tmp_path: Path) -> None:
    """kill -9 of the saver: training goes on, the agent starts another, and the next checkpoint is committed."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=20)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: beat.save is not None and beat.save.committed, "a checkpoint")
        assert beat.save is not None
        assert beat.save.committed is not None
        first = beat.save.committed.step
        saver = pid_of_saver(client.agent.pid)
        assert saver is not None
        os.kill(saver, signal.SIGKILL)
        await client.until(
            lambda beat: beat.save is not None and beat.save.committed and beat.save.committed.step > first + 20,
            "a checkpoint by the saver that follows",
        )
        assert pid_of_saver(client.agent.pid) not in (None, saver)
        assert all(rank.exit is None for rank in client.heartbeat.ranks)  # type: ignore[union-attr]


async def test_what_hung_ranks_cannot_save_is_saved_for_them(tmp_path: Path) -> None:
    """SIGTERM to a pod whose ranks are stopped: the newest snapshot, which was to stay in memory, is committed."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", memory_interval_steps=5)
    async with a_worker(tmp_path, MEND_GRACE_SECONDS="12") as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: whole(beat, 20), "a snapshot in memory")
        for rank in (0, 1):
            os.kill(pid_of(beat, rank), signal.SIGSTOP)
        os.kill(client.agent.pid, signal.SIGTERM)
        await client.left()
        _, saved = next_attempt(open_store(plan.uri))
        assert saved
        assert saved[0].step >= 20
        assert saved[0].attempt == 1


async def test_what_ranks_leave_in_memory_is_saved_if_no_others_come(tmp_path: Path) -> None:
    """Of killed ranks that nobody launches anew: the newest step, or once that is given up the one before."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", memory_interval_steps=50)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: whole(beat, 99), "two snapshots of both ranks")
        for rank in (0, 1):
            os.kill(pid_of(beat, rank), signal.SIGKILL)
        before, newest = sorted(held.step for held in beat.held if held.ranks == (0, 1))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / f"step-{newest:012d}").touch()  # where the save of that step would have its folder
        beat = await client.until(lambda beat: beat.save is not None and beat.save.committed, "a checkpoint")
        assert beat.save is not None
        assert beat.save.committed is not None
        assert beat.save.committed.step == before
        beats = [line for _, line in client.lines if isinstance(line, Heartbeat)]
        assert any(f"step {newest}" in each.save.error for each in beats if each.save is not None)


async def test_a_save_is_finished_although_its_rank_was_killed(tmp_path: Path) -> None:
    """Ranks killed as soon as a save was staged: it is committed all the same, and told by the agent."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=30)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: all(rank.step >= 29 for rank in beat.ranks) and beat.ranks, "step 29")
        for rank in (0, 1):
            os.kill(pid_of(beat, rank), signal.SIGKILL)
        beat = await client.until(lambda beat: beat.save is not None and beat.save.committed, "a checkpoint")
        assert beat.save is not None
        assert beat.save.committed is not None
        assert beat.save.committed.step >= 29
        await client.order(Stop(attempt=1, exit=True))
        await client.left()


async def test_a_killed_agent_takes_only_its_memory_along(tmp_path: Path) -> None:
    """kill -9 of the agent ends its ranks and its saver; another goes on from the newest committed checkpoint."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=10)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: beat.save is not None and beat.save.committed, "a checkpoint")
        saver = pid_of_saver(client.agent.pid)
        assert saver is not None
        os.kill(client.agent.pid, signal.SIGKILL)
        await client.left()
        for pid in (saver, pid_of(beat, 0), pid_of(beat, 1)):
            await until_gone(pid)
    _, saved = next_attempt(open_store(plan.uri))
    async with a_worker(tmp_path) as client:
        await launch(client, 2, plan, *saved)
        beat = await client.until(lambda beat: beat.restored is not None and beat.attempt == 2, "restored")
        assert beat.restored == saved[0]


async def until_gone(pid: int) -> None:
    """Wait until that process has ended."""
    give_up_at = time.monotonic() + 60
    while look_at(pid).state not in (GONE, "Z"):
        assert time.monotonic() < give_up_at, f"process {pid} is still there"
        await asyncio.sleep(0.01)


def test_a_pod_that_is_too_small_is_told_before_the_first_step(tmp_path: Path) -> None:
    """In a memory cgroup that cannot hold the copies the session names the limit and the remedy; nothing is saved."""
    program = tmp_path / "large.py"
    program.write_text(
        "import sys, torch\n"
        "from mend.orders import CheckpointPlan\n"
        "from mend_trainer.session import Session\n"
        "model = torch.nn.Linear(4096, 8192, bias=False)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "with Session(model=model, optimizer=optimizer, checkpoint=CheckpointPlan(uri=sys.argv[1])):\n"
        "    print('entered')\n"
    )
    with limited_memory(700 << 20) as group:
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        command = [*inside, sys.executable, str(program), f"file://{tmp_path}/run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "MemoryTooSmall: resources.limits.memory: 700Mi" in done.stderr
    assert "snapshots of this worker need 768Mi" in done.stderr
    assert "entered" not in done.stdout
    assert not (tmp_path / "run").exists()


async def test_a_last_step_that_was_restored_from_memory_is_committed_too(tmp_path: Path) -> None:
    """Ranks that were killed between the copy of the last step and its commit end only once it is in the store."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", memory_interval_steps=1)
    async with a_worker(tmp_path, STEPS="12") as client:
        (tmp_path / "run").touch()  # no folder can be made there: nothing can be saved
        await launch(client, 1, plan)
        beat = await client.until(lambda beat: whole(beat, 11), "the last step in memory")
        held = whole(beat)
        assert held is not None
        for rank in (0, 1):
            os.kill(pid_of(beat, rank), signal.SIGKILL)
        await client.until(has_exit(1, 1))
        (tmp_path / "run").unlink()
        await launch(client, 2, plan, in_memory(held))
        await client.until(lambda beat: beat.attempt == 2 and beat.state is AgentState.FINISHED, "the end")
        _, saved = next_attempt(open_store(plan.uri))
        assert (saved[0].step, saved[0].attempt) == (11, 2)


async def test_a_finished_run_has_committed_its_last_step(tmp_path: Path) -> None:
    """The last step's checkpoint is there when the ranks have succeeded."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run")
    async with a_worker(tmp_path, STEPS="12") as client:
        await launch(client, 1, plan)
        await client.until(lambda beat: beat.state is AgentState.FINISHED, "the end")
        _, saved = next_attempt(open_store(plan.uri))
        assert [ref.step for ref in saved] == [11]
