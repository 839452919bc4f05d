"""Processes are recognised beyond doubt: what is ours is found whatever it did, and nobody else is ever touched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from pathlib import Path

from mend_local.containers import record_path
from mend_local.processes import (
    OWNER_ENV,
    Identity,
    Process,
    end_owned,
    end_recorded,
    is_running,
    look_at,
    owned_by,
    send,
)
from pod_host import a_host, a_pod, eventually, shell

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
FORK_STORM = """
import os, time
for _ in range(5):
    os.fork()
while True:
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
    time.sleep(0.01)
"""


async def test_a_process_that_wipes_its_environment_is_found_by_its_record(tmp_path: Path) -> None:
    """Without its owner mark a process and its children are still ended in a later life, by what was written down."""
    async with a_host(tmp_path) as host:
        runner = host.run(a_pod(shell("exec env -i sh -c 'sleep 1000 & wait'")))
        await eventually(lambda: runner.processes, "it runs")
        process = runner.processes["main"]
        await eventually(lambda: len(process.members()) == 2 and host.processes() == [], "it has no mark")
        ended = await asyncio.to_thread(end_recorded, record_path(tmp_path / runner.uid, "main"))
        assert len(ended) == 2
        await asyncio.wait_for(runner.ended(), 30)
        assert runner.status["phase"] == "Failed"


async def test_a_pid_that_was_handed_out_again_is_spared(tmp_path: Path) -> None:
    """A record whose PID belongs to another process by now, or to another boot, ends nobody."""
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        me = look_at(stranger.pid)
        assert me is not None
        for record in (
            {"pid": stranger.pid, "started_ticks": me.identity.started_ticks - 1, "boot": BOOT},
            {"pid": stranger.pid, "started_ticks": me.identity.started_ticks, "boot": "another"},
            {"pid": stranger.pid},
            [],
        ):
            (tmp_path / "record.json").write_text(json.dumps(record))
            assert end_recorded(tmp_path / "record.json") == []
        assert not send(Identity(stranger.pid, me.identity.started_ticks - 1), signal.SIGKILL)
        assert is_running(me.identity)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_everything_owned_is_ended_and_nothing_else(tmp_path: Path) -> None:
    """An owner mark covers all that inherited it, in whatever session, and no owner of a similar name."""
    mine, other = f"{uuid.uuid4().hex}/a", f"{uuid.uuid4().hex}/a"
    with (tmp_path / "log").open("wb") as log:
        processes = [
            Process.start(
                ["/bin/sh", "-c", "setsid sleep 1000 & sleep 1000"],
                owner=owner,
                env={"PATH": os.environ["PATH"]},
                cwd=tmp_path,
                output=log.fileno(),
            )
            for owner in (mine, other)
        ]
    await eventually(lambda: len(owned_by(mine)) >= 2 and len(owned_by(other)) >= 2, "both run")
    await asyncio.to_thread(end_owned, mine)
    assert owned_by(mine) == []
    assert is_running(processes[1].identity)
    processes[1].signal(signal.SIGKILL)
    assert await processes[0].reap() == -signal.SIGKILL
    assert await processes[1].reap() == -signal.SIGKILL
    assert owned_by(other) == []


async def test_a_fork_storm_is_ended(tmp_path: Path) -> None:
    """Processes that keep forking while they are ended are all ended."""
    owner = uuid.uuid4().hex
    with (tmp_path / "log").open("wb") as log:
        process = Process.start(
            [sys.executable, "-c", FORK_STORM],
            owner=owner,
            env={OWNER_ENV: owner},
            cwd=tmp_path,
            output=log.fileno(),
        )
    await eventually(lambda: len(owned_by(owner)) >= 16, "it forks")
    process.signal(signal.SIGKILL)
    await process.reap()
    assert owned_by(owner) == []
