"""A peer as a running program: started with the same trainer, hurt by the same faults, watched through its output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from peers import NVRX, RAY, python_of

from mend_trainer.procfs import descendants

HERE = Path(__file__).parent
TRAINER = str(HERE / "peer_trainer.py")
STEP = re.compile(r"mend\.train: step (\d+) ")
RANK = re.compile(r"rank (\d+) has pid (\d+)")
START_SECONDS = 180.0
STEADY_STEPS = 8
TORCHRUN_FAILED = (
    r"Sending process \d+ closing signal|failed \(exitcode|Worker group.*(FAILED|UNHEALTHY)"
    r"|will restart worker group|SignalException"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True)
class Launcher:
    """How to start a peer, and by which lines of its output it shows that it has noticed a failure."""

    name: str
    command: Callable[[int, Path], list[str]]  # for so many ranks, with a folder for its own files
    noticed: re.Pattern[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def torchrun(program: Sequence[str] = (TRAINER, "torchrun")) -> Launcher:
    """torchrun, looking at its ranks every 100 ms."""

    def command(ranks: int, folder: Path) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        limits = ["--max-restarts", "100000", "--monitor-interval", "0.1", "--nproc-per-node", str(ranks)]
        return [*launcher, *limits, *program]

    # torch 2.13 lets all attempts share one store without a prefix: after a restart gloo finds the addresses of the
    # dead and hangs. A store for each attempt is the kinder setting.
    kinder = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return Launcher("torchrun", command, re.compile(TORCHRUN_FAILED), kinder)


def nvrx(program: Sequence[str] = (TRAINER, "nvrx"), silence_seconds: float = 1.0) -> Launcher:
    """NVRx's ft_launcher at its quickest: looks every 100 ms, a heartbeat per step, a second of silence is a hang.

    A limit below the longest gap between two heartbeats kills healthy ranks, and here that gap holds a save. Raises
    `PeerUnavailable`.
    """
    python = python_of(NVRX)

    def command(ranks: int, folder: Path) -> list[str]:
        launcher = [str(python), "-m", "nvidia_resiliency_ext.fault_tolerance.launcher", "--standalone"]
        limits = ["--max-restarts", "100000", "--monitor-interval", "0.1", "--workers-stop-timeout", "0.1"]
        watch = ["--ft-workload-check-interval", "0.1", "--ft-rank-heartbeat-timeout", str(silence_seconds)]
        watch += ["--ft-initial-rank-heartbeat-timeout", "60", "--ft-restart-check-interval", "1"]
        watch += ["--ft-enable-nic-monitor", "False", "--ft-restart-policy", "any-failed"]
        ours = ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
        return [*launcher, *ours, *limits, *watch, *program]

    noticed = re.compile(rf"FT timeout elapsed|{TORCHRUN_FAILED}")
    return Launcher("NVRx", command, noticed, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def ray_train() -> Launcher:
    """Ray Train. Raises `PeerUnavailable`."""
    python = python_of(RAY)

    def command(ranks: int, folder: Path) -> list[str]:
        return [str(python), str(HERE / "ray_driver.py"), str(ranks), str(folder / "ray")]

    noticed = re.compile(
        r"ActorDiedError|WorkerDiedError|WorkerHealthCheck|worker.* died|failure handling decision", re.I
    )
    return Launcher("Ray Train", command, noticed)


class NeverTrained(Exception):
    """A peer does not come to train steadily; the message is what it said last."""


@dataclass(slots=True)
class Launched:
    """A running peer, and what its output has told so far, with the time of each line."""

    process: asyncio.subprocess.Process
    noticed: re.Pattern[str]
    steps: list[tuple[float, int]] = field(default_factory=list)
    failures: list[float] = field(default_factory=list)
    pids: dict[int, int] = field(default_factory=dict)
    lines: list[tuple[float, str]] = field(default_factory=list)

    async def read(self) -> None:
        """Take the output in until it ends."""
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            line, now = raw.decode(errors="replace").rstrip(), time.time()
            self.lines = [*self.lines[-200:], (now, line)]
            if found := STEP.search(line):
                self.steps.append((now, int(found[1])))
            elif found := RANK.search(line):
                self.pids[int(found[1])] = int(found[2])
            elif self.noticed.search(line):
                self.failures.append(now)

    async def steady(self) -> None:
        """It has trained for some steps since the last fault. Raises `NeverTrained` if not."""
        if await self.until(lambda: self.steps[-1][0] if len(self.steps) > STEADY_STEPS else None, START_SECONDS):
            return
        said = "\n".join(line for _, line in self.lines[-20:])
        raise NeverTrained(f"not for {STEADY_STEPS} steps within {START_SECONDS:.0f} s:\n{said}")

    async def until(self, what: Callable[[], float | None], seconds: float) -> float | None:
        """When something has happened, as `what` says; None if it has not within `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.returncode is None:
            if (at := what()) is not None:
                return at
            await asyncio.sleep(0.01)
        return None


@contextlib.asynccontextmanager
async def launched(launcher: Launcher, folder: Path, arguments: list[str], ranks: int) -> AsyncIterator[Launched]:
    """The peer with as many restarts as it wants, checkpoints below `folder`; everything ends with the block."""
    saves = ["--set", f"checkpoint.uri=file://{folder}/{launcher.name.replace(' ', '-')}-{ranks}"]
    command = [*launcher.command(ranks, folder), *arguments, *saves, "--set", "checkpoint.every_steps=5"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, **launcher.environment},
        start_new_session=True,
        limit=1 << 20,
    )
    run = Launched(process, launcher.noticed)
    reading = asyncio.create_task(run.read())
    try:
        yield run
    finally:
        for pid in (*descendants([process.pid]), process.pid, *run.pids.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()
        reading.cancel()


@dataclass(frozen=True, slots=True)
class Hurt:
    """A fault at `at` (since the epoch): seconds until it was noticed and until a new step was done; None: never.

    `step_seconds` is what a step took before it.
    """

    at: float
    step_seconds: float
    noticed: float | None
    back: float | None


async def injured(run: Launched, number: signal.Signals, patience: float) -> Hurt:
    """Send the signal to the last rank of a peer that trains steadily, and wait for its return, so long at most.

    What comes back counts even where nothing was said before: the first step of processes that came after is new.
    """
    await run.steady()
    length = median(after - before for (before, _), (after, _) in pairwise(run.steps))
    victim, at = run.pids[max(run.pids)], time.time()
    os.kill(victim, number)
    back = await run.until(lambda: _new_step(run, at, victim), patience)
    noticed = next((each for each in run.failures if each > at), None)
    run.steps.clear()
    return Hurt(at, length, None if noticed is None else noticed - at, None if back is None else back - at)


def _new_step(run: Launched, at: float, victim: int) -> float | None:
    """When the first step of the processes that came after the fault was done."""
    if victim in run.pids.values():
        return None
    restarted = max((when for when, line in run.lines if RANK.search(line)), default=at)
    return next((when for when, _ in run.steps if when > max(at, restarted)), None)
