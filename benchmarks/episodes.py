"""Runs on the local cluster that are hurt again and again: an episode is one fault and the way back from it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mend.apply import TRAINING_RUNS
from mend.demo.watch import Sight, Watcher
from mend.incidents import IncidentRecord
from mend.kube.client import KubeClient
from mend.status import RunPhase
from mend_local.bootstrap import S3_SECRET
from mend_local.cluster import LocalCluster
from mend_trainer.procfs import descendants

NAMESPACE = "default"
PROGRAM = Path(__file__).with_name("hurtable_trainer.py")
PRELOAD = "mend_trainer.train,transformers.models.llama.modeling_llama,marks"  # what mend's own command preloads
STEPS_BETWEEN = 12  # enough that a checkpoint is committed
STEPS_LEARNT = 64  # a hang is judged by what was learnt, of which there is some three times a second
PATIENCE_SECONDS = 120.0


class NotBack(Exception):
    """The run has failed, or does not come to where it should within `PATIENCE_SECONDS`."""


class Harm(StrEnum):
    """What is done to a rank, or to what is around it."""

    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    SLEEP = "sleep"
    HOLD_GIL = "held GIL"
    KILL_COLD = "SIGKILL, with no standby left"
    KILL_AGENT = "SIGKILL to a worker's agent"


SIGNALS = {
    Harm.KILL: signal.SIGKILL,
    Harm.STOP: signal.SIGSTOP,
    Harm.SLEEP: signal.SIGUSR2,
    Harm.HOLD_GIL: signal.SIGWINCH,
    Harm.KILL_COLD: signal.SIGKILL,
}


HANGS = (Harm.STOP, Harm.SLEEP, Harm.HOLD_GIL)


@dataclass(frozen=True, slots=True)
class Episode:
    """One fault: seconds until the incident was in the status, and until all ranks had made a new step."""

    harm: Harm
    rank: int
    at: float  # since the epoch
    incident: IncidentRecord
    decided: float = 0.0  # when the attempt began that brought it back
    deaths: tuple[float, ...] = ()  # of the ranks that were there

    @property
    def detected(self) -> float:
        """Seconds to the incident."""
        return self.incident.detected_at - self.at

    @property
    def recovered(self) -> float:
        """Seconds to the first new step of all ranks."""
        assert self.incident.recovered_at is not None
        return self.incident.recovered_at - self.at


@dataclass(frozen=True, slots=True)
class Hospital:
    """A local cluster, and the eyes on it."""

    cluster: LocalCluster
    client: KubeClient
    watcher: Watcher
    scratch: Path
    environment: Mapping[str, str]  # of every rank

    @asynccontextmanager
    async def run(self, name: str, spec: dict[str, Any]) -> AsyncIterator[Patient]:
        """A run of this name, which is deleted afterwards."""
        await self.client.create(TRAINING_RUNS, NAMESPACE, self._manifest(name, spec))
        try:
            yield Patient(self.watcher, name, spec["workers"]["replicas"] * spec["workers"].get("ranksPerWorker", 1))
        finally:
            await self.client.delete(TRAINING_RUNS, NAMESPACE, name)

    def _manifest(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        assert self.cluster.s3 is not None
        settings = ["steps=1000000", "log_every_seconds=0", f"data.cache={self.scratch}/data"]
        trainer = {
            "name": "trainer",
            "image": "mend-trainer",
            "command": ["python", str(PROGRAM), *(word for each in settings for word in ("--set", each))],
            "env": [
                {"name": "GLOO_SOCKET_IFNAME", "value": "lo"},
                {"name": "MEND_PRELOAD", "value": PRELOAD},
                {"name": "GIL_HOLDER", "value": f"{self.scratch}/gil_holder.so"},
                *({"name": name, "value": value} for name, value in self.environment.items()),
            ],
        }
        plenty = {"user": 1000, "infrastructure": 1000, "hang": 1000, "preemption": 1000}
        checkpoint = {"uri": f"s3://{self.cluster.s3.bucket}/{name}", "credentialsSecret": S3_SECRET}
        return {
            "apiVersion": "mend.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": name},
            "spec": {
                **spec,
                "workers": {**spec["workers"], "template": {"spec": {"containers": [trainer]}}},
                "checkpoint": {**checkpoint, "interval": "5 steps"},
                "recovery": {"budgets": plenty, **spec.get("recovery", {})},
            },
        }


@asynccontextmanager
async def a_hospital(scratch: Path, environment: Mapping[str, str] = {}) -> AsyncIterator[Hospital]:
    """A local cluster in `scratch`, gone afterwards."""
    async with LocalCluster(scratch / "cluster") as cluster:
        client = await KubeClient.from_kubeconfig(str(cluster.kubeconfig))
        watcher = Watcher(client, NAMESPACE)
        try:
            yield Hospital(cluster, client, watcher, scratch, environment)
        finally:
            await watcher.close()
            await client.close()


@dataclass(slots=True)
class Patient:
    """One run, to be hurt."""

    watcher: Watcher
    name: str
    world_size: int

    async def episodes(self, harms: Iterable[Harm], tell: Callable[[], object]) -> list[Episode]:
        """One after the other, each once the run trains steadily; ranks take turns.

        A run that does not come back ends the list, not the benchmark: fewer samples say so.
        """
        found: list[Episode] = []
        for number, harm in enumerate(harms):
            try:
                found.append(await self.episode(harm, (number + 1) % self.world_size))
            except NotBack as why:
                print(f"run {self.name}, {harm}: {why}", file=sys.stderr)
                break
            tell()
        return found

    async def episode(self, harm: Harm, rank: int) -> Episode:
        """Hurt it and wait until it is well again."""
        least = STEPS_LEARNT if harm in HANGS else STEPS_BETWEEN
        steady = await self._until(lambda sight: self._steps_done(sight) >= least, "trains steadily")
        before = steady.status.incidents[-1].id if steady.status.incidents else 0
        deaths = Deaths([each.pid for each in steady.ranks])
        at = _hurt(steady, rank, harm)

        def is_over(sight: Sight) -> bool:
            last = sight.status.incidents[-1] if sight.status.incidents else None
            return last is not None and last.id > before and not last.is_open

        over = await self._until(is_over, f"is back from {harm} of rank {rank}")
        first = next(each for each in over.status.incidents if each.id > before)
        last = over.status.incidents[-1]
        incident = first if first is last else _joined(first, last)
        return Episode(harm, rank, at, incident, over.status.attempt_started_at or 0.0, deaths.close())

    def _steps_done(self, sight: Sight) -> int:
        """The least of what ranks have done in this attempt; 0 while the gang, or its standbys, are not all there."""
        whole = len(sight.ranks) == self.world_size and sight.standbys_ready >= self.world_size
        if sight.status.phase is not RunPhase.RUNNING or not whole:
            return 0
        return min(rank.steps_done for rank in sight.ranks)

    async def _until(self, is_so: Callable[[Sight], bool], what: str) -> Sight:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            sight = await self.watcher.see(self.name)
            if is_so(sight):
                return sight
            if sight.status.phase is RunPhase.FAILED:
                raise NotBack(f"it has failed: {[each.message for each in sight.status.conditions]}")
            await asyncio.sleep(0.05)
        raise NotBack(
            f"not within {PATIENCE_SECONDS:.0f} s: {what}; {sight.status.phase}, {sight.status.incidents[-1:]}"
        )


class Deaths:
    """Notes when each of these processes ends."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._times: list[float] = []
        self._watched = {os.pidfd_open(pid) for pid in pids}
        for each in self._watched:
            asyncio.get_running_loop().add_reader(each, self._ended, each)

    def _ended(self, watched: int) -> None:
        self._times.append(time.time())
        self._let_go(watched)

    def close(self) -> tuple[float, ...]:
        """The times so far; no more is watched."""
        for each in tuple(self._watched):
            self._let_go(each)
        return tuple(self._times)

    def _let_go(self, watched: int) -> None:
        self._watched.discard(watched)
        asyncio.get_running_loop().remove_reader(watched)
        os.close(watched)


def _joined(first: IncidentRecord, last: IncidentRecord) -> IncidentRecord:
    """A recovery that broke and was begun again: noticed with the first incident, over with the last."""
    return replace(last, detected_at=first.detected_at)


def _hurt(sight: Sight, rank: int, harm: Harm) -> float:
    """Do it; when, in seconds since the epoch."""
    pid = next(each.pid for each in sight.ranks if each.rank == rank and each.exit is None)
    agents = {agent_of(each.pid) for each in sight.ranks}
    if harm is Harm.KILL_COLD:
        for helper in descendants([*agents]):
            if _name(helper) in ("mend-zygote", "mend-standby"):
                os.kill(helper, signal.SIGKILL)
    at = time.time()
    if harm is Harm.KILL_AGENT:
        os.kill(agent_of(pid), signal.SIGKILL)
    else:
        os.kill(pid, SIGNALS[harm])
    return at


def agent_of(pid: int) -> int:
    """The agent above this process."""
    while pid > 1:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith((b"mend-agent", b"mend_trainer.agent")) for word in words[:4]):
            return pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    raise RuntimeError("the rank has no agent above it")


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
