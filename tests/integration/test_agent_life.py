"""How a real agent starts, recovers its own helpers, and ends: nothing of it is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from agents_real import (
    LOOP,
    STEPS,
    a_launch,
    all_gone,
    an_agent,
    at_step,
    descendants_of,
    has_exit,
    is_running,
    launched,
    named,
    warm,
)
from memory_cgroup import limited_memory
from mend.environment import ENV_GRACE_SECONDS, ENV_HEARTBEAT_SECONDS, ENV_TOKEN, ENV_WORKER
from mend.exitcodes import ExitCode
from mend.heartbeats import AgentState
from mend.orders import Stop
from waiting import eventually


def left_in_memory(prefix: str) -> list[Path]:
    """Folders of agents whose name begins so."""
    return list(Path("/dev/shm").glob(prefix + "*"))


async def test_sigterm_saves_and_leaves(tmp_path: Path) -> None:
    """SIGTERM: told at once, ranks save, everything ends inside the grace period, exit code 143, nothing is left."""
    async with an_agent(["python", STEPS], tmp_path) as client:
        await launched(client)
        await client.until(at_step(3))
        processes = descendants_of(client.agent)
        os.kill(client.agent.pid, signal.SIGTERM)
        await client.until(lambda beat: beat.terminating)
        assert await client.left() == ExitCode.TERMINATED
        assert "rank 0] saved at step" in client.agent.output
        assert "attempt 1: saved at step" in client.agent.output
        assert "left behind" not in client.agent.output
        await all_gone(processes)


async def test_sigterm_does_not_wait_for_a_rank_that_cannot_save(tmp_path: Path) -> None:
    """A stopped rank will never save: when the grace is over the agent kills it and leaves."""
    async with an_agent(["python", STEPS], tmp_path, env={ENV_GRACE_SECONDS: "2"}) as client:
        await launched(client)
        beat = await client.until(at_step(1))
        os.kill(beat.ranks[1].pid, signal.SIGSTOP)
        os.kill(client.agent.pid, signal.SIGTERM)
        assert await client.left() == ExitCode.TERMINATED
        assert not is_running(beat.ranks[1].pid)


async def test_sigterm_while_standbys_are_being_born_leaves_none(tmp_path: Path) -> None:
    """Told to leave in the middle of a refill: every process is gone, and none had to be left behind."""
    async with an_agent(["python", STEPS], tmp_path) as client:
        await warm(client)
        for pid in named(client.agent, "mend-standby"):
            os.kill(pid, signal.SIGKILL)
        await client.until(lambda beat: beat.standbys_ready == 1)
        processes = descendants_of(client.agent)
        os.kill(client.agent.pid, signal.SIGTERM)
        assert await client.left() == ExitCode.TERMINATED
        assert "left behind" not in client.agent.output
        await all_gone(processes)


async def test_a_finished_agent_waits_for_the_word_to_leave(tmp_path: Path) -> None:
    """All ranks exit with 0: finished, and told so until the controller says `stop` with an exit code."""
    async with an_agent(["python", STEPS], tmp_path) as client:
        await launched(client, STEPS="5")
        beat = await client.until(lambda beat: beat.state is AgentState.FINISHED)
        assert [rank.step for rank in beat.ranks] == [4, 4]
        await client.order(Stop(attempt=1, exit=True, exit_code=0))
        assert await client.left() == 0


async def test_nothing_outlives_a_killed_agent(tmp_path: Path) -> None:
    """kill -9 of the agent takes ranks, standbys, zygote and stores with it, and the next agent sweeps its folder."""
    async with an_agent(["python", STEPS], tmp_path) as client:
        await launched(client)
        await client.until(lambda beat: at_step(2)(beat) and beat.standbys_ready == 2)
        processes = descendants_of(client.agent)
        assert len(processes) >= 6
        folder = f"mend-agent-{client.agent.pid}-"
        assert left_in_memory(folder)
        client.agent.process.kill()
        await client.left()
        await all_gone(processes)
    async with an_agent(["python", STEPS], tmp_path) as client:
        await client.until(lambda _: True)
        assert not left_in_memory(folder)


async def test_a_gang_over_two_agents_recovers_in_place(tmp_path: Path) -> None:
    """Two workers; one rank dies; both relaunch attempt 2, the second worker first, with a store that knows no past."""
    async with (
        an_agent(["python", STEPS], tmp_path, ranks=1) as first,
        an_agent(["python", STEPS], tmp_path, worker=1, ranks=1) as second,
    ):
        await asyncio.gather(warm(first), warm(second))
        for attempt in (1, 2, 3):
            await second.order(a_launch(attempt, first, workers=2, worker=1))
            await first.order(a_launch(attempt, first, workers=2))
            await asyncio.gather(first.until(at_step(2, attempt)), second.until(at_step(2, attempt)))
            beat = second.heartbeat
            assert beat is not None
            os.kill(beat.ranks[0].pid, signal.SIGKILL)
            await second.until(has_exit(1, attempt))


async def test_the_first_step_of_an_attempt_is_told_at_once(tmp_path: Path) -> None:
    """A recovery is over with it, so no interval is waited for: here heartbeats would be ten minutes apart."""
    env = {ENV_HEARTBEAT_SECONDS: "600", "STEP_SECONDS": "4"}
    async with an_agent(["python", LOOP], tmp_path, env=env) as client:
        await launched(client)
        beat = await client.until(lambda beat: beat.restored and beat.standbys_ready == 2, "nothing else to tell")
        assert not any(rank.steps_done for rank in beat.ranks)
        await client.until(lambda beat: all(rank.steps_done for rank in beat.ranks), "the first step")


async def test_any_program_can_be_a_rank(tmp_path: Path) -> None:
    """A shell that starts Python gets torchrun's environment, the store and the page; a second attempt works too."""
    async with an_agent(["sh", "-c", f"echo rank $RANK of $WORLD_SIZE; exec python {STEPS}"], tmp_path) as client:
        for attempt in (1, 2):
            await launched(client, attempt)
            await client.until(at_step(2, attempt))
        assert "[attempt 2 rank 1] rank 1 of 2" in client.agent.output


async def test_a_command_that_does_not_exist_ends_with_127(tmp_path: Path) -> None:
    """The rank ends at once, with the code that says that trying again cannot help, and a line that says why."""
    async with an_agent(["no-such-command", "--flag"], tmp_path, ranks=1) as client:
        await launched(client)
        beat = await client.until(has_exit(0))
        ended = beat.ranks[0].exit
        assert ended is not None
        assert ended.code == ExitCode.NOT_FOUND
        assert "no-such-command: no such command" in ended.log_tail[-1]


async def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    """A child in a session of its own is killed with its rank, and orphans leave no zombies."""
    note = tmp_path / "pid"
    program = Path(STEPS).with_name("leaves_children.py")
    async with an_agent(["python", str(program), str(note)], tmp_path, ranks=1) as client:
        await launched(client)
        await client.until(lambda _: note.exists() and note.read_text().strip())
        runaway = int(note.read_text())
        assert is_running(runaway)
        await eventually(lambda: all(is_running(pid) for pid in descendants_of(client.agent)), "no zombie stays")
        await client.order(Stop(attempt=1))
        await client.until(lambda beat: beat.state is AgentState.IDLE)
        await all_gone([runaway])


async def test_an_output_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    """The agent's stdout is a pipe that is full: ranks flood it and train on, the agent answers."""
    read, write = os.pipe()
    try:
        async with an_agent(["python", STEPS], tmp_path, stdout=write) as client:
            await launched(client, FAULT="flood")
            await client.until(at_step(20))
            evidence = await client.gather(1)
            assert evidence.ranks[0].log_tail[-1].startswith("flood 299999")
    finally:
        os.close(read)
        os.close(write)


async def test_the_oom_killer_is_named(tmp_path: Path) -> None:
    """A rank that eats all memory of its container is told as killed for that; one killed by hand is not."""
    with limited_memory(1536 << 20) as group:
        async with an_agent(["python", STEPS], tmp_path) as client:
            (group / "cgroup.procs").write_text(str(client.agent.pid))
            await warm(client)
            await launched(client)
            beat = await client.until(at_step(1))
            os.kill(beat.ranks[0].pid, signal.SIGKILL)
            beat = await client.until(has_exit(0))
            assert beat.ranks[0].exit is not None
            assert not beat.ranks[0].exit.oom_killed
            await launched(client, 2, FAULT="eat", FAULT_RANK="1")
            beat = await client.until(has_exit(1, 2))
            assert beat.ranks[1].exit is not None
            assert (beat.ranks[1].exit.signal, beat.ranks[1].exit.oom_killed) == (signal.SIGKILL, True)


def test_a_bad_environment_is_named_variable_by_variable() -> None:
    """Exit code 78 and one line per bad variable."""
    environment = {**os.environ, ENV_WORKER: "two", ENV_HEARTBEAT_SECONDS: "0"}
    environment.pop(ENV_TOKEN, None)
    done = subprocess.run(
        [sys.executable, "-m", "mend_trainer.agent"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == ExitCode.BAD_CONFIG
    for name in ("command", ENV_TOKEN, ENV_WORKER, ENV_HEARTBEAT_SECONDS):
        assert f"mend-agent: {name}: " in done.stderr
