"""torchrun --max-restarts with the same trainer and the same faults: when it notices, when it trains again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

STEP = re.compile(r"mend\.train: step (\d+) ")
START_SECONDS = 120.0
# torch 2.13 lets all attempts share one store without a prefix: after a restart gloo finds the addresses of the dead
# and hangs. A store for each attempt is the kinder setting.
ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
}
FAILED = re.compile(r"failed \(exitcode|Worker group.*FAILED|will restart worker group|SignalException")


@dataclass(slots=True)
class Torchrun:
    """A running torchrun, and what its output has told so far, with the time of each line."""

    process: asyncio.subprocess.Process
    steps: list[tuple[float, int]] = field(default_factory=list)
    failures: list[float] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    async def read(self) -> None:
        """Take the output in until it ends."""
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            line, now = raw.decode(errors="replace"), time.time()
            self.tail = [*self.tail[-20:], line.rstrip()]
            if found := STEP.search(line):
                self.steps.append((now, int(found[1])))
            elif FAILED.search(line):
                self.failures.append(now)

    async def until(self, what: Callable[[], float | None], seconds: float) -> float | None:
        """When something has happened, as `what` says; None if it has not within `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.returncode is None:
            if (at := what()) is not None:
                return at
            await asyncio.sleep(0.01)
        return None

    def rank_pids(self) -> list[int]:
        """Its ranks, in the order in which they were started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(int(child) for child in children)


@contextlib.asynccontextmanager
async def torchrun(folder: Path, trainer: list[str], ranks: int) -> AsyncIterator[Torchrun]:
    """torchrun with as many restarts as it wants, checkpoints below `folder`; everything ends with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), "--max-restarts", "1000", "-m", *trainer]
    command += ["--set", f"checkpoint.uri=file://{folder}/torchrun", "--set", "checkpoint.every_steps=5"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    run = Torchrun(process)
    reading = asyncio.create_task(run.read())
    try:
        yield run
    finally:
        pids = run.rank_pids() if process.returncode is None else []
        for pid in (*pids, process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()
        reading.cancel()


async def injured(run: Torchrun, number: signal.Signals, patience: float) -> tuple[float | None, float | None]:
    """(seconds to notice, seconds to the next new step) after a signal to the last rank; None: not within patience."""
    if await run.until(lambda: run.steps[-1][0] if len(run.steps) > 3 else None, START_SECONDS) is None:
        raise RuntimeError("torchrun never trained: " + "\n".join(run.tail))
    at = time.time()
    os.kill(run.rank_pids()[-1], number)
    noticed = await run.until(lambda: next((each for each in run.failures if each > at), None), patience)
    if noticed is None:
        return None, None
    back = await run.until(lambda: next((when for when, _ in run.steps if when > noticed), None), patience)
    run.steps.clear()
    return noticed - at, None if back is None else back - at
