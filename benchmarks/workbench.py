"""A run without a cluster: real agents, real ranks, mend's own thinking, and pods that are plain processes.

Between `AgentPool` and `decide` there is nothing but this loop, so a fault costs what agents and ranks cost and no
more: no API server, no store. What the controller adds around it (watches, status writes) `recovery.py` measures.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import with_tests  # noqa: F401

from agents_real import AgentProcess
from gang_of_agents import follow, uid_of
from mend.actions import AnyAction, CreateWorker, DeleteWorker, SendGather, SendLaunch, SendStop
from mend.agents import AgentPool
from mend.decide import decide
from mend.dial import AgentError
from mend.environment import ENV_GRACE_SECONDS, ENV_HEARTBEAT_SECONDS
from mend.heartbeats import RankReport
from mend.incidents import IncidentRecord
from mend.listing import StoreView
from mend.observation import Observation, PodPhase, WorkerPod
from mend.orders import Gather, Stop
from mend.spec import Spec, parse_spec
from mend.status import RunStatus

RUN = ("benchmarks", "run")
NEVER = 1 << 30


def a_spec(workers: int, ranks: int, command: Sequence[str], **more: Any) -> Spec:
    """A spec with every default but the budgets, which a campaign would use up."""
    plenty = {"user": 100_000, "infrastructure": 100_000, "hang": 100_000, "preemption": 100_000}
    trainer = {"name": "trainer", "image": "mend-trainer", "command": list(command)}
    raw = {
        "workers": {
            "replicas": workers,
            "ranksPerWorker": ranks,
            "template": {"spec": {"containers": [trainer]}},
        },
        "checkpoint": {"uri": "file:///nonexistent", "interval": "24h"},
        "recovery": {"budgets": plenty},
        **more,
    }
    return parse_spec(raw)


@dataclass(slots=True)
class Pod:
    """A worker's pod: an agent as a process of this machine."""

    index: int
    attempt: int
    agent: AgentProcess
    made_at: float = field(default_factory=time.monotonic)
    deleting: bool = False

    @property
    def uid(self) -> str:
        """Unique."""
        return uid_of(self.agent)

    def fact(self) -> WorkerPod:
        """As the controller would see it."""
        code = self.agent.process.poll()
        ended = PodPhase.SUCCEEDED if code == 0 else PodPhase.FAILED
        return WorkerPod(
            index=self.index,
            name=f"run-{self.index}-{self.attempt}",
            uid=self.uid,
            phase=PodPhase.RUNNING if code is None else ended,
            ip=self.agent.host,
            node=f"node-{self.index}",
            attempt=self.attempt,
            deleting=self.deleting,
            age_seconds=time.monotonic() - self.made_at,
            exit_code=code if code is None or code >= 0 else 128 - code,
        )


class Workbench:
    """One run, from its first launch until the block ends. `status` is what the controller would have written."""

    def __init__(self, spec: Spec, command: Sequence[str], folder: Path, env: Mapping[str, str] = {}) -> None:
        self.spec = spec
        self.status = RunStatus()
        self.noted_at: dict[int, float] = {}  # incident -> when the status with it was there, by time.time()
        self._command, self._folder, self._env = command, folder, dict(env)
        self._pods: list[Pod] = []
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._pool = AgentPool(on_news=lambda run: self._wake.set())
        self._orders: dict[object, asyncio.Task[None]] = {}
        self._thinking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thinking = asyncio.create_task(self._think())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._thinking is not None
        for task in (self._thinking, *self._orders.values()):
            task.cancel()
        await asyncio.gather(self._thinking, *self._orders.values(), return_exceptions=True)
        await self._pool.close()
        await asyncio.gather(*(asyncio.to_thread(pod.agent.end) for pod in self._pods))

    # ------------------------------------------------------------ seeing
    def ranks(self) -> tuple[RankReport, ...]:
        """The ranks of the present attempt, as last told."""
        return self._observe(time.time()).ranks

    @property
    def last_incident(self) -> IncidentRecord | None:
        """The newest."""
        return self.status.incidents[-1] if self.status.incidents else None

    @property
    def is_open(self) -> bool:
        """Whether the run is not yet back from an incident."""
        return self.status.open_incident is not None

    async def until(self, holds: Callable[[], Any], what: str, seconds: float) -> Any:
        """The first true value of `holds`; raises `TimeoutError` with what was waited for."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert self._thinking is not None
            if self._thinking.done():
                self._thinking.result()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not within {seconds:g} s: {what}; {self._tell()}")
            self._changed.clear()
            try:  # progress is no news: so looked at again every now and then
                await asyncio.wait_for(self._changed.wait(), min(left, 0.05))
            except TimeoutError:
                continue
        return found

    def steps_done(self) -> int:
        """The least of what the ranks of a complete gang have done in this attempt; 0 while it is not complete."""
        ranks = self.ranks()
        if len(ranks) < self.spec.world_size or any(rank.exit or rank.error for rank in ranks):
            return 0
        return min(rank.steps_done for rank in ranks)

    def step_seconds(self) -> float:
        """How long steps take in this attempt; the median of what was learnt."""
        seconds = sorted(self._pool.step_times(RUN).seconds)
        return seconds[len(seconds) // 2] if seconds else float("nan")

    def _tell(self) -> str:
        ranks = ", ".join(f"{rank.rank}:{rank.phase}@{rank.step}" for rank in self.ranks())
        tails = " ".join(pod.agent.output[-500:] for pod in self._pods[-2:])
        return f"phase {self.status.phase}, attempt {self.status.attempt}, ranks {ranks}; agents said: {tails}"

    # ------------------------------------------------------------ thinking
    async def _think(self) -> None:
        while True:
            self._wake.clear()
            now = time.time()
            seen = self._observe(now)
            decision = decide(self.spec, seen, now)
            self.status = decision.status
            for incident in decision.status.incidents:
                self.noted_at.setdefault(incident.id, time.time())
            if decision.status != seen.status:
                self._changed.set()
            for action in decision.actions:
                self._do(action)
            try:
                await asyncio.wait_for(self._wake.wait(), decision.wake_after)
            except TimeoutError:
                continue

    def _observe(self, now: float) -> Observation:
        pods = tuple(pod.fact() for pod in self._pods)
        self._pool.fence(RUN, self.status.attempt)
        follow(self._pool, RUN, [pod.agent for pod in self._pods if pod.agent.process.poll() is None])
        return Observation(
            namespace=RUN[0],
            name=RUN[1],
            uid="uid",
            generation=1,
            created_at=now,
            status=self.status,
            pods=pods,
            agents=self._pool.views(RUN),
            evidence=self._pool.evidence(RUN),
            store=StoreView(listed=True, listed_for=NEVER),
            step_times=self._pool.step_times(RUN),
            has_service=True,
            has_token=True,
        )

    # ------------------------------------------------------------ doing
    def _do(self, action: AnyAction) -> None:
        match action:
            case CreateWorker(index=index, attempt=attempt):
                self._create(index, attempt)
            case DeleteWorker(uid=uid):
                self._delete(uid)
            case SendLaunch(launch=launch):
                self._send(action.worker, action.pod_uid, launch)
            case SendGather():
                self._send(action.worker, action.pod_uid, Gather(attempt=action.attempt, seconds=action.seconds))
            case SendStop():
                stop = Stop(attempt=action.attempt, reason=action.reason, grace_seconds=action.grace_seconds)
                self._send(action.worker, action.pod_uid, stop)
            case _:
                pass  # events, and what only a cluster has

    def _create(self, index: int, attempt: int) -> None:
        if any(pod.index == index and not pod.deleting for pod in self._pods):
            return
        spec = self.spec
        env = {
            ENV_HEARTBEAT_SECONDS: f"{spec.health.heartbeat_seconds:g}",
            ENV_GRACE_SECONDS: "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **self._env,
        }
        agent = AgentProcess(self._command, self._folder, worker=index, ranks=spec.workers.ranks_per_worker, env=env)
        pod = Pod(index, attempt, agent)
        self._pods.append(pod)
        loop, watched = asyncio.get_running_loop(), os.pidfd_open(agent.pid)

        def ended() -> None:
            loop.remove_reader(watched)
            os.close(watched)
            self._wake.set()

        loop.add_reader(watched, ended)

    def _delete(self, uid: str) -> None:
        for pod in [each for each in self._pods if each.uid == uid and not each.deleting]:
            pod.deleting = True
            self._orders[uid] = task = asyncio.create_task(asyncio.to_thread(pod.agent.end))
            task.add_done_callback(lambda _, pod=pod: self._gone(pod))

    def _gone(self, pod: Pod) -> None:
        self._orders.pop(pod.uid, None)
        if pod in self._pods:
            self._pods.remove(pod)
        self._wake.set()

    def _send(self, worker: int, pod_uid: str, order: Any) -> None:
        key = (pod_uid, type(order), order.attempt)
        if key not in self._orders:
            task = self._orders[key] = asyncio.create_task(self._deliver(worker, pod_uid, order))
            task.add_done_callback(lambda _: self._orders.pop(key, None))

    async def _deliver(self, worker: int, pod_uid: str, order: Any) -> None:
        try:
            await self._pool.send(RUN, worker, pod_uid, order)
        except AgentError:
            await asyncio.sleep(0)  # as in the controller: the next look decides from what is then seen
        self._wake.set()
