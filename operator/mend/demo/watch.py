"""What the demonstration sees of a run: its status, its ranks, and how to do them harm."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from enum import StrEnum

from mend import render
from mend.agents import AgentPool
from mend.apply import TRAINING_RUNS
from mend.crstatus import from_resource
from mend.heartbeats import RankReport
from mend.incidents import IncidentKind
from mend.kube.client import PODS, SECRETS, KubeClient
from mend.kube.errors import NotFound
from mend.names import LABEL_RUN, TOKEN_SECRET_KEY
from mend.observe import decoded, targets, worker_pod
from mend.status import RunStatus


class Harm(StrEnum):
    """What can be done to a rank from outside."""

    CRASH = "crash"
    HANG = "hang"

    @property
    def signal(self) -> signal.Signals:
        """The signal that does it."""
        return signal.SIGKILL if self is Harm.CRASH else signal.SIGSTOP

    @property
    def shows_as(self) -> IncidentKind:
        """The kind of incident that it must be noticed as."""
        return IncidentKind.CRASHED if self is Harm.CRASH else IncidentKind.HUNG


@dataclass(frozen=True, slots=True)
class Plan:
    """Do this harm to this rank once that step is done."""

    harm: Harm
    rank: int
    step: int


@dataclass(frozen=True, slots=True)
class Injection:
    """Harm that was done: to which rank, after which step, and when (seconds since the epoch)."""

    harm: Harm
    rank: int
    step: int
    at: float


@dataclass(frozen=True, slots=True)
class Sight:
    """A run as it is now."""

    name: str
    status: RunStatus
    ranks: tuple[RankReport, ...] = ()
    workers: dict[int, int] | None = None  # rank -> worker
    standbys_ready: int = 0  # of all workers

    @property
    def step(self) -> int:
        """The last step that all known ranks have completed; the status knows it only every few seconds."""
        return min((rank.step for rank in self.ranks), default=self.status.step)


class Watcher:
    """Looks at runs of one namespace; listens to their agents as the controller does."""

    def __init__(self, client: KubeClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._pool = AgentPool()
        self._tokens: dict[str, str] = {}

    async def close(self) -> None:
        """Ends all streams."""
        await self._pool.close()

    async def see(self, name: str) -> Sight:
        """The run of this name now."""
        run = await self._client.get(TRAINING_RUNS, self._namespace, name)
        status = from_resource(run.get("status"))
        listed = await self._client.list_all(PODS, self._namespace, label_selector=f"{LABEL_RUN}={name}")
        pods = [worker_pod(pod, {}, time.time()) for pod in listed.items]
        key = (self._namespace, name)
        self._pool.update(key, targets(pods, await self._token(name)))
        beats = [
            view.heartbeat
            for view in self._pool.views(key)
            if view.heartbeat is not None and view.heartbeat.attempt == status.attempt
        ]
        ranks = tuple(sorted((rank for beat in beats for rank in beat.ranks), key=lambda rank: rank.rank))
        places = {rank.rank: beat.worker for beat in beats for rank in beat.ranks}
        return Sight(name, status, ranks, places, sum(beat.standbys_ready for beat in beats))

    async def _token(self, name: str) -> str | None:
        if name not in self._tokens:
            try:
                secret = await self._client.get(SECRETS, self._namespace, render.token_secret_name(name))
            except NotFound:
                return None
            self._tokens[name] = decoded(secret, (TOKEN_SECRET_KEY,))[TOKEN_SECRET_KEY]
        return self._tokens[name]


def injure(sight: Sight, rank: int, harm: Harm) -> Injection | None:
    """Do harm to one rank of a run on this machine; None if there is no such living rank."""
    victim = next((each for each in sight.ranks if each.rank == rank and each.exit is None), None)
    if victim is None:
        return None
    at = time.time()
    try:
        os.kill(victim.pid, harm.signal)
    except ProcessLookupError:
        return None
    return Injection(harm, rank, victim.step, at)
