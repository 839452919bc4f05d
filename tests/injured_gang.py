"""A gang of real agents and ranks to be injured, and the eyes of a controller upon it.

Agents, ranks, gloo and streams are real; `AgentPool` hears them and `diagnose` thinks about what it heard, as in a
controller. Only the API server is played: pods are there, and stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from agents_real import AgentProcess
from gang_of_agents import RUN, GangOfAgents, uid_of
from injured_network import Network
from memory_cgroup import limited_memory
from mend.diagnose import diagnose, seconds_until_diagnosis
from mend.dial import AgentError
from mend.heartbeats import RankReport
from mend.incidents import Incident
from mend.observation import AgentView, Observation, PodPhase, WorkerPod
from mend.orders import Gather
from mend.records import GATHER_SECONDS
from mend.spec import Spec, parse_spec
from mend.status import RunPhase, RunStatus
from waiting import eventually

PROGRAMS = Path(__file__).parent / "programs"
MEMORY_BYTES = 2 << 30  # of both workers of a gang on memory-bound ground
WARM_STEPS = 12  # enough for the limit of a step to be learnt


class Ground(StrEnum):
    """What a gang must stand on for some faults to be possible."""

    PLAIN = "nothing special"
    MEMORY = "a memory cgroup"
    NETWORK = "a network namespace for each worker"
    CLOCK = "a wall clock that can be set"


class InjuredGang(GangOfAgents):
    """Agents and ranks to be injured, and the eyes of a controller upon them."""

    def __init__(self, folder: Path, workers: int, ranks: int, ground: Ground, spec: Spec) -> None:
        super().__init__(folder, workers, ranks)
        self.ground, self.spec = ground, spec
        self.network: Network | None = None
        self.cgroup: Path | None = None
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.clock_offset = folder / "clock-offset"
        self.clock_offset.write_bytes(bytes(struct.calcsize("q")))

    def ranks_of(self, worker: int) -> tuple[int, ...]:
        """What this worker holds."""
        return tuple(rank for rank in range(self.world_size) if self.worker_of(rank) == worker)

    def set_clock(self, seconds: int) -> None:
        """Move the wall clock of agents and ranks, on ground where it can be set."""
        with self.clock_offset.open("r+b") as offset:  # in place: processes have it mapped
            offset.write(struct.pack("q", seconds))

    def wall_clock(self) -> float:
        """Seconds since the epoch as a process on this ground reads them."""
        env = {**os.environ, **self._clock_environment()}
        told = subprocess.run(["date", "+%s"], env=env, check=True, capture_output=True, timeout=30)
        return float(told.stdout)

    def has_its_clock(self, rank: RankReport) -> bool:
        """Whether this rank reads the clock of its ground."""
        return "clock.so" in Path(f"/proc/{rank.pid}/maps").read_text()

    def _clock_environment(self) -> dict[str, str]:
        on_ground = {"LD_PRELOAD": str(self.folder / "clock.so")} if self.ground is Ground.CLOCK else {}
        return {"CLOCK_OFFSET": str(self.clock_offset), **on_ground}

    # ------------------------------------------------------------ life
    async def launch(self) -> None:
        """The next attempt, until every rank has made some steps; agents that were killed are made anew."""
        self.heal()
        self.start_missing_agents()
        await eventually(self.are_all_ready, "agents with a store and standbys", 90)
        store_port = self.begin_attempt()
        env = {"FAULTS": str(self.faults)} | ({"GLOO_SOCKET_IFNAME": "eth0"} if self.network else {})
        await asyncio.gather(*(self.launch_on(view, store_port, env=env) for view in self.views()))
        await self.at_step(WARM_STEPS)

    def heal(self) -> None:
        """Take back what is wrong with the ground, and what was asked for and not yet done."""
        self.set_clock(0)
        if self.network is not None:
            self.network.mend()
        for request in self.faults.iterdir():
            request.unlink()

    async def at_step(self, step: int) -> None:
        """Every rank of the attempt has completed this step."""
        await eventually(lambda: self.has_passed(step), f"step {step} of attempt {self.attempt}", 90)

    def has_passed(self, step: int) -> bool:
        """Whether every rank has completed this step."""
        ranks = self.ranks()
        return len(ranks) == self.world_size and min(rank.step for rank in ranks) >= step

    def an_agent(self, worker: int) -> AgentProcess:
        """On this gang's ground."""
        prefix: list[str] = []
        if self.cgroup is not None:
            prefix += ["sh", "-c", f'echo $$ > {self.cgroup}/cgroup.procs; exec "$@"', "sh"]
        if self.network is not None:
            prefix += self.network.enter(worker)
        env = {"GIL_HOLDER": str(self.folder / "gil_holder.so"), **self._clock_environment()}
        return AgentProcess(
            [sys.executable, str(PROGRAMS / "injured.py")],
            self.folder,
            worker=worker,
            ranks=self.ranks_per_worker,
            env=env,
            host=self.network.address(worker) if self.network is not None else "",
            prefix=prefix,
        )

    # ------------------------------------------------------------ seeing
    def observe(self) -> Observation:
        """What a controller would know now."""
        pods = tuple(
            WorkerPod(
                index=worker,
                name=f"run-{worker}",
                uid=uid_of(agent),
                phase=PodPhase.RUNNING,
                ip=agent.host,
                node=f"node-{worker}",
                attempt=self.attempt,
            )
            for worker, agent in self.agents.items()
        )
        return Observation(
            name=RUN[1],
            namespace=RUN[0],
            uid="run-uid",
            generation=1,
            created_at=0.0,
            status=RunStatus(phase=RunPhase.RUNNING, attempt=self.attempt, participants=tuple(range(self.workers))),
            pods=pods,
            agents=self.views(),
            evidence=self.pool.evidence(RUN),
            step_times=self.pool.step_times(RUN),
            has_service=True,
            has_token=True,
            has_tls=True,
        )

    def ranks(self) -> tuple[RankReport, ...]:
        """The ranks of the attempt as their agents tell of them."""
        return self.observe().ranks

    async def incident(self, until: Callable[[], Any] = lambda: False, seconds: float = 60.0) -> Incident | None:
        """The first incident with its verdict, evidence gathered as a controller does; None if `until` holds first."""
        deadline = time.monotonic() + seconds
        while not until():
            seen = self.observe()
            incident = diagnose(self.spec, seen)
            if incident is not None and incident.needs_evidence:
                await self._gather()
                incident = diagnose(self.spec, self.observe())
            if incident is not None and not incident.awaiting:
                return incident
            assert time.monotonic() < deadline, f"no incident within {seconds:g} s; ranks: {self.ranks()}"
            self.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), min(0.1, seconds_until_diagnosis(self.spec, seen)))
        return None

    async def _gather(self) -> None:
        """Ask all agents at once; who does not answer in time is not waited for."""
        order = Gather(attempt=self.attempt, seconds=GATHER_SECONDS)

        async def ask(view: AgentView) -> None:
            with contextlib.suppress(AgentError, TimeoutError):
                async with asyncio.timeout(GATHER_SECONDS):
                    await self.pool.send(RUN, view.worker, view.pod_uid, order)

        await asyncio.gather(*(ask(view) for view in self.views() if view.connected))


@contextlib.asynccontextmanager
async def a_gang(
    folder: Path, *, workers: int = 2, ranks: int = 2, ground: Ground = Ground.PLAIN, floor: str = "1500ms"
) -> AsyncIterator[InjuredGang]:
    """Warm agents for `workers` x `ranks` real ranks on this ground; skips the test where the ground cannot be had.

    `folder` is there and empty; `floor` is the shortest time without a step that may be called a hang.
    """
    with _the_ground(ground, workers) as (cgroup, network):
        _build(PROGRAMS / "gil_holder.c", folder / "gil_holder.so")
        _build(PROGRAMS / "clock.c", folder / "clock.so")
        gang = InjuredGang(folder, workers, ranks, ground, _spec(workers, ranks, floor))
        gang.cgroup, gang.network = cgroup, network
        try:
            yield gang
        finally:
            await gang.close()


@contextlib.contextmanager
def _the_ground(ground: Ground, workers: int) -> Iterator[tuple[Path | None, Network | None]]:
    with contextlib.ExitStack() as stack:
        cgroup = stack.enter_context(limited_memory(MEMORY_BYTES)) if ground is Ground.MEMORY else None
        network = stack.enter_context(Network.of(workers)) if ground is Ground.NETWORK else None
        yield cgroup, network


def _build(source: Path, library: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (gcc or cc)")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)


def _spec(workers: int, ranks: int, floor: str) -> Spec:
    trainer = {"name": "trainer", "image": "trainer:1", "command": ["python", "injured.py"]}
    return parse_spec(
        {
            "workers": {
                "replicas": workers,
                "ranksPerWorker": ranks,
                "template": {"spec": {"containers": [trainer]}},
            },
            "checkpoint": {"uri": "s3://bucket/run"},
            "health": {"heartbeatInterval": "100ms", "limits": {"floor": floor, "pause": "2s"}},
            "recovery": {"rollBackOnDivergence": True},
        }
    )
