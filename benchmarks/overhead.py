"""What the session and the agent cost a run to which nothing happens, as a share of its step time.

    python benchmarks/overhead.py [--quick] [--json FILE]

Two real gloo ranks under a real agent, with steps of 100 ms. Blocks of bare steps (no session, agent stopped) and of
steps under mend (session, agent with heartbeats every 300 ms and a listener) alternate within one process, so that
the machine's moods hit both alike; compared are the medians of pairs of neighbouring blocks.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from figures import Row, arguments, publish, row
from rich.console import Console
from rich.progress import Progress

from mend.agents import AgentPool, Target
from mend.protocol import (
    AGENT_PORT,
    ENV_HEARTBEAT_SECONDS,
    ENV_POD_IP,
    ENV_RANKS_PER_WORKER,
    ENV_RUN,
    ENV_TOKEN,
    ENV_WORKER,
    AgentState,
    Heartbeat,
    Launch,
    Stop,
)

HOST, TOKEN, RUN, POD, RANKS = "127.63.0.1", "benchmark", ("benchmarks", "overhead"), "pod", 2
STEPS, TARGET_PERCENT = 20, 1.0


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Overhead without faults", asyncio.run(measure(options)), options)


async def measure(options: Namespace) -> list[Row]:
    """One row: percent of the step time."""
    blocks = 10 if options.quick else 40
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("blocks", total=2 * blocks)
        lines = []
        async for line in _blocks(blocks):
            lines.append(line)
            bar.advance(task)
    watched = [each for each in lines if not each["bare"]]
    bare = [statistics.median(each["seconds"]) for each in lines if each["bare"]]
    mend = [statistics.median(each["seconds"]) for each in watched]
    # What is spent, whether or not it shows in the length of a step: the rank's calls, and its part of the agent.
    spent = [
        100 * (statistics.median(each["calls"]) / statistics.median(each["seconds"]) + each["agent_share"] / RANKS)
        for each in watched
    ]
    percents = [100 * (ours - theirs) / theirs for ours, theirs in zip(mend, bare, strict=True)]
    step = f"a step of {statistics.median(bare) * 1000:.0f} ms"
    return [
        row(f"{step} under mend, above the bare loop", percents, TARGET_PERCENT, unit="%"),
        row(f"session's calls and half of the agent's CPU time, of {step}", spent, TARGET_PERCENT, unit="%"),
    ]


async def _blocks(blocks: int) -> AsyncIterator[dict[str, Any]]:
    """The lines that rank 0 prints, as they come."""
    with tempfile.TemporaryDirectory(prefix="mend-bench-") as scratch:
        loop = [sys.executable, str(Path(__file__).with_name("overhead_loop.py")), str(blocks), str(STEPS)]
        async with _agent(loop, Path(scratch)) as process:
            pool = AgentPool()
            pool.update(RUN, [Target(0, POD, HOST, AGENT_PORT, TOKEN)])
            try:
                ready = await _heartbeat(pool, lambda beat: beat.store_port > 0 and beat.standbys_ready == RANKS)
                order = Launch(
                    attempt=1,
                    world_size=RANKS,
                    first_rank=0,
                    ranks=RANKS,
                    workers=1,
                    master_addr=HOST,
                    master_port=ready.store_port,
                )
                await pool.send(RUN, 0, POD, order)
                assert process.stdout is not None
                seen = 0
                while seen < 2 * blocks:
                    line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
                    if not line:
                        raise RuntimeError("the agent has ended before its ranks")
                    if (start := line.find('{"bare"')) >= 0:
                        seen += 1
                        yield json.loads(line[start:])
                await _heartbeat(pool, lambda beat: beat.state is AgentState.FINISHED)
                await pool.send(RUN, 0, POD, Stop(attempt=1, exit=True, exit_code=0))
            finally:
                await pool.close()


async def _heartbeat(pool: AgentPool, is_so: object) -> Heartbeat:
    assert callable(is_so)
    async with asyncio.timeout(120):
        while True:
            (view,) = pool.views(RUN)
            if view.heartbeat is not None and is_so(view.heartbeat):
                return view.heartbeat
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _agent(command: list[str], scratch: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real agent around the loop; it ends with the block."""
    environment = {
        ENV_RUN: "/".join(RUN),
        ENV_WORKER: "0",
        ENV_RANKS_PER_WORKER: str(RANKS),
        ENV_TOKEN: TOKEN,
        ENV_POD_IP: HOST,
        ENV_HEARTBEAT_SECONDS: "0.3",
        "GLOO_SOCKET_IFNAME": "lo",
        "TMPDIR": str(scratch),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mend_trainer.agent", "--", *command,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
