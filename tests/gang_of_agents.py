"""Real agents with their ranks, as a controller has them: kept alive, followed by their streams, told to launch."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agents_real import TOKEN, AgentProcess
from mend.agents import AgentPool, RunKey
from mend.dial import Target
from mend.observation import AgentView
from mend.orders import Launch
from mend.protocol import AGENT_PORT

RUN = ("tests", "run")


def uid_of(agent: AgentProcess) -> str:
    """Of the pod that this agent would be in: no two agents have one address at the same time."""
    return f"{agent.worker}-{agent.host}-{agent.pid}"


def follow(pool: AgentPool, run: RunKey, agents: Iterable[AgentProcess]) -> None:
    """Keep a stream to each of these agents, and to no others."""
    pool.update(run, [Target(agent.worker, uid_of(agent), agent.host, AGENT_PORT, TOKEN) for agent in agents])


class GangOfAgents(ABC):
    """The agents of one run, on this machine; what they run, and on what ground, is for those who derive from it."""

    def __init__(self, folder: Path, workers: int, ranks: int) -> None:
        self.folder, self.workers, self.ranks_per_worker = folder, workers, ranks
        self.attempt = 0
        self.agents: dict[int, AgentProcess] = {}
        self.news = asyncio.Event()
        self.pool = AgentPool(on_news=lambda run: self.news.set())

    @property
    def world_size(self) -> int:
        """Ranks of the gang."""
        return self.workers * self.ranks_per_worker

    def worker_of(self, rank: int) -> int:
        """Who holds this rank."""
        return rank // self.ranks_per_worker

    def views(self) -> tuple[AgentView, ...]:
        """What the agents' streams tell."""
        return self.pool.views(RUN)

    @abstractmethod
    def an_agent(self, worker: int) -> AgentProcess:
        """Start the agent of this worker."""

    def start_missing_agents(self) -> None:
        """Those that were killed are made anew, and followed."""
        for worker in range(self.workers):
            if worker not in self.agents or self.agents[worker].process.poll() is not None:
                self.agents[worker] = self.an_agent(worker)
        follow(self.pool, RUN, self.agents.values())

    def are_all_ready(self) -> bool:
        """Whether every agent has a store and a standby for each rank."""
        beats = [view.heartbeat for view in self.views() if view.connected and view.heartbeat is not None]
        able = [beat for beat in beats if beat.store_port and beat.standbys_ready >= self.ranks_per_worker]
        return len(able) == self.workers

    def begin_attempt(self) -> int:
        """The next attempt, from which on older words are not heard; the port of its stores."""
        self.attempt += 1
        self.pool.fence(RUN, self.attempt)
        master = self.views()[0].heartbeat
        assert master is not None
        return master.store_port

    async def launch_on(self, view: AgentView, store_port: int, **more: Any) -> None:
        """Order one agent to start its ranks of the attempt; raises `AgentError` if it cannot be told."""
        order = Launch(
            attempt=self.attempt,
            world_size=self.world_size,
            first_rank=self.ranks_per_worker * view.worker,
            ranks=self.ranks_per_worker,
            workers=self.workers,
            master_addr=self.agents[0].host,
            master_port=store_port,
            run="/".join(RUN),
            **more,
        )
        await self.pool.send(RUN, view.worker, view.pod_uid, order)

    async def close(self) -> None:
        """All processes are gone."""
        await self.pool.close()
        for agent in self.agents.values():
            agent.end()
