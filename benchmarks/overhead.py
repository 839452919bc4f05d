"""What watching costs a run to which nothing happens, as a share of its step time, beside torchrun and NVRx.

    python benchmarks/overhead.py [--quick] [--json FILE]

Two real gloo ranks under a real agent, with steps of 100 ms. Blocks of bare steps (nothing called, every watcher
stopped) and of watched steps (session and agent with heartbeats every 300 ms and a listener; NVRx's heartbeat per step,
its monitors and launcher) alternate within one process, so that the machine's moods hit both alike; compared are the
medians of pairs of neighbouring blocks.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from figures import Peer, Row, arguments, publish, row
from launched import ENVIRONMENT, Launcher, nvrx, torchrun
from peers import PeerUnavailable
from rich.console import Console
from rich.progress import Progress

from mend.agents import AgentPool
from mend.dial import Target
from mend.environment import ENV_HEARTBEAT_SECONDS, ENV_POD_IP, ENV_RANKS_PER_WORKER, ENV_RUN, ENV_TOKEN, ENV_WORKER
from mend.heartbeats import AgentState, Heartbeat
from mend.orders import Launch, Stop
from mend.protocol import AGENT_PORT
from mend_trainer.procfs import descendants

HOST, TOKEN, RUN, POD, RANKS = "127.63.0.1", "benchmark", ("benchmarks", "overhead"), "pod", 2
STEPS, TARGET_PERCENT = 20, 0.5
LOOP = Path(__file__).with_name("overhead_loop.py")


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Overhead without faults", asyncio.run(measure(options)), options)


async def measure(options: Namespace) -> list[Row]:
    """Two rows: what is seen in the length of a step, and what is spent in all."""
    blocks = 6 if options.quick else 40
    sources = {"mend": _blocks, "torchrun": partial(_peer_blocks, _torchrun), "NVRx": partial(_peer_blocks, _nvrx)}
    found: dict[str, list[dict[str, Any]]] = {}
    peers: dict[str, Peer] = {}
    with Progress(console=Console(stderr=True)) as bar:
        for name, source in sources.items():
            task = bar.add_task(name, total=2 * blocks)
            try:
                found[name] = [line async for line in _counted(source(blocks), partial(bar.advance, task))]
            except PeerUnavailable as why:
                peers[name] = str(why)
    ours = found.pop("mend")
    step = f"a step of {1000 * median(bare_steps(ours)):.0f} ms"
    return [
        _row(f"{step}, watched, above the bare one", above_bare, ours, found, peers),
        _row(f"calls in the rank and CPU time of its watchers, of {step}", spent, ours, found, peers),
    ]


async def _counted(lines: AsyncIterator[dict[str, Any]], tell: Callable[[], None]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        tell()
        yield line


def _row(
    figure: str,
    of: Callable[[Sequence[dict[str, Any]]], list[float]],
    ours: Sequence[dict[str, Any]],
    theirs: dict[str, list[dict[str, Any]]],
    missing: dict[str, Peer],
) -> Row:
    peers: dict[str, Peer] = {name: round(median(of(lines)), 4) for name, lines in theirs.items()}
    return row(figure, of(ours), TARGET_PERCENT, unit="%", peers={**peers, **missing})


def bare_steps(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The median step of each bare block, in seconds."""
    return [median(each["seconds"]) for each in lines if each["bare"]]


def above_bare(lines: Sequence[dict[str, Any]]) -> list[float]:
    """By how many percent watched steps are longer than bare ones, pair by pair."""
    watched = [median(each["seconds"]) for each in lines if not each["bare"]]
    return [100 * (ours - bare) / bare for ours, bare in zip(watched, bare_steps(lines), strict=True)]


def spent(lines: Sequence[dict[str, Any]]) -> list[float]:
    """What is spent, whether or not it shows in the length of a step: a rank's calls, and its part of the watchers."""
    return [
        100 * (median(each["calls"] or [0.0]) / median(each["seconds"]) + each["agent_share"] / RANKS)
        for each in lines
        if not each["bare"]
    ]


async def _blocks(blocks: int) -> AsyncIterator[dict[str, Any]]:
    """The lines that rank 0 prints, as they come."""
    with tempfile.TemporaryDirectory(prefix="mend-bench-") as scratch:
        loop = [sys.executable, str(LOOP), str(blocks), str(STEPS), "mend"]
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
                async for line in _lines(process, 2 * blocks):
                    yield line
                await _heartbeat(pool, lambda beat: beat.state is AgentState.FINISHED)
                await pool.send(RUN, 0, POD, Stop(attempt=1, exit=True, exit_code=0))
            finally:
                await pool.close()


async def _lines(process: asyncio.subprocess.Process, count: int) -> AsyncIterator[dict[str, Any]]:
    """So many of the lines that rank 0 prints, as they come."""
    assert process.stdout is not None
    while count:
        line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode(errors="replace")
        if not line:
            raise RuntimeError("the ranks, or what watches them, have ended too early")
        if (start := line.find('{"bare"')) >= 0:
            count -= 1
            yield json.loads(line[start:])


def _torchrun() -> Launcher:
    return torchrun((str(LOOP),))


def _nvrx() -> Launcher:
    # While its monitors are stopped no heartbeat reaches them: the limit, which costs nothing, must outlast a block.
    return nvrx((str(LOOP),), silence_seconds=120.0)


async def _peer_blocks(make: Callable[[], Launcher], blocks: int) -> AsyncIterator[dict[str, Any]]:
    """As `_blocks`, under a peer. Raises `PeerUnavailable`."""
    launcher = await asyncio.to_thread(make)
    with tempfile.TemporaryDirectory(prefix="mend-bench-") as scratch:
        command = [*launcher.command(RANKS, Path(scratch)), str(blocks), str(STEPS), launcher.name.lower()]
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **ENVIRONMENT, **launcher.environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            async for line in _lines(process, 2 * blocks):
                yield line
        finally:
            for pid in (*descendants([process.pid]), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await process.wait()


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
