"""Simulated pods: an agent that obeys orders as the real one does, and the kubelet's part in its life."""

from __future__ import annotations

from dataclasses import dataclass, field

from mend.evidence import Evidence
from mend.exitcodes import ExitCode
from mend.heartbeats import AgentState, Heartbeat, RankExit, SaveReport
from mend.observation import PodPhase, WorkerPod
from mend.orders import Ack, Check, Checked, Gather, Launch, Order, SaveNow, Stop
from simulated_gang import STEP_SECONDS, Gang, Rank
from simulated_memory import Arena

GOODBYE_SECONDS = 1.0


@dataclass
class Node:
    """A machine. The API server learns only after a while that it is dead."""

    name: str
    alive: bool = True
    ready: bool = True
    changes_at: float | None = None
    memory_share: float = 1.0  # how fast its memory is, in terms of others'
    problems: tuple[str, ...] = ()  # as those who watch machines tell the API server
    leaves: str = ""  # that it will be gone, as the cloud tells
    rack: str = ""


@dataclass
class Ending:
    """A graceful end that is under way: after a save of at least `step`, or at the deadline."""

    step: int
    deadline: float
    exit_code: int | None


@dataclass(eq=False)
class Agent:
    """PID 1 of a pod. `frozen`: it is stopped and says nothing, while its ranks go on."""

    worker: int
    port: int
    attempt: int = 0
    fence: int = 0
    gang: Gang | None = None
    ranks: list[Rank] = field(default_factory=list)
    stopped: bool = False
    terminating: bool = False
    frozen: bool = False
    ending: Ending | None = None
    exit_code: int | None = None
    sequence: int = 0
    saves: bool = False  # has a saver
    saver_back_at: float | None = None  # while there is none
    arena: Arena = field(default_factory=Arena)
    buddy: str = ""

    @property
    def living(self) -> list[Rank]:
        """Ranks whose process runs."""
        return [rank for rank in self.ranks if rank.alive]

    @property
    def state(self) -> AgentState:
        """As the real agent tells it."""
        if self.gang is None:
            return AgentState.IDLE
        if self.stopped:
            return AgentState.STOPPING if self.living else AgentState.IDLE
        done = all(rank.exit is not None and rank.exit.code == 0 for rank in self.ranks)
        return AgentState.FINISHED if done else AgentState.RUNNING

    # ------------------------------------------------------------ orders
    def obey(
        self, order: Order, now: float, gangs: dict[int, Gang], new_gang: type[Gang] | object
    ) -> Ack | Evidence | Checked:
        """Carries out an order that is not stale."""
        match order:
            case Launch():
                return self._launch(order, now, gangs, new_gang)
            case Stop():
                return self._stop(order, now)
            case Gather():
                if self.gang is None or order.attempt != self.attempt:
                    return self._refuse("no such ranks here")
                told = tuple(self.gang.evidence(rank, now) for rank in self.ranks)
                return Evidence(attempt=self.attempt, worker=self.worker, ranks=told)
            case Check():
                if self.living:
                    return self._refuse("ranks are running here")
                return Checked(attempt=order.attempt, worker=self.worker, round=order.round)
            case SaveNow():
                if self.gang is None or order.attempt != self.attempt or not self.living:
                    return self._refuse("no such ranks here")
                self.gang.save_wanted = True
                return Ack(accepted=True, attempt=self.attempt)

    def _launch(self, order: Launch, now: float, gangs: dict[int, Gang], new_gang: object) -> Ack:
        if self.gang is not None and order.attempt == self.attempt:
            return Ack(accepted=True, attempt=self.attempt, reason="launched already")
        if self.terminating or order.attempt <= self.fence or order.attempt < self.attempt:
            return self._refuse("stale, or terminating")
        kept = {rank.number: rank for rank in self.gang.release(order, self.ranks)} if self.gang is not None else {}
        self.ranks = [rank for rank in self.ranks if rank.number not in kept]
        self._kill(now)
        if order.attempt not in gangs:
            gangs[order.attempt] = new_gang(order)  # type: ignore[operator]
        self.attempt, self.gang, self.stopped, self.ending = order.attempt, gangs[order.attempt], False, None
        numbers = range(order.first_rank, order.first_rank + order.ranks)
        self.buddy = order.buddy
        self.ranks = [kept[number] if number in kept else Rank(number, now, arena=self.arena) for number in numbers]
        for rank in self.ranks:
            rank.worker, rank.launch = self.worker, order
        self.gang.ranks |= {rank.number: rank for rank in self.ranks}
        return Ack(accepted=True, attempt=self.attempt)

    def _stop(self, order: Stop, now: float) -> Ack:
        if order.attempt < self.attempt:
            return self._refuse("stale")
        self.fence = max(self.fence, order.attempt)
        self._end(now, order.grace_seconds, int(order.exit_code) if order.exit else None)
        return Ack(accepted=True, attempt=self.attempt)

    def _refuse(self, reason: str) -> Ack:
        return Ack(accepted=False, attempt=self.attempt, reason=reason)

    # ------------------------------------------------------------ ending
    def terminate(self, now: float, grace_seconds: float) -> None:
        """SIGTERM."""
        if not self.terminating:
            self.terminating = True
            done = self.state is AgentState.FINISHED
            self._end(now, grace_seconds * 0.8, int(ExitCode.SUCCEEDED if done else ExitCode.TERMINATED))

    def _end(self, now: float, grace_seconds: float, exit_code: int | None) -> None:
        if self.gang is not None and self.living and grace_seconds > 0:
            self.gang.save_wanted = True
            self.ending = Ending(self.gang.step, now + grace_seconds, exit_code)
            return
        if self.state is not AgentState.FINISHED:
            self._kill(now)
        if exit_code is not None:
            self.exit_code = exit_code

    def _kill(self, now: float) -> None:
        for rank in self.ranks:
            rank.end(now, RankExit(signal=9))
        self.stopped = True

    def live(self, now: float) -> None:
        """What it does by itself as time passes."""
        if self.saver_back_at is not None and now >= self.saver_back_at:
            self.saver_back_at = None
        ending, gang = self.ending, self.gang
        if ending is None or gang is None:
            return
        saved = gang.committed is not None and gang.committed.step >= ending.step
        nothing_to_save = ending.step < 0 or not self.living
        if saved or nothing_to_save or now >= ending.deadline - GOODBYE_SECONDS:
            for rank in self.ranks:
                rank.end(now, RankExit(signal=15))
            self.stopped = True
            self.ending = None
            if ending.exit_code is not None:
                self.exit_code = ending.exit_code

    @property
    def saver_port(self) -> int:
        """The agent's own, so that it outlives savers."""
        return self.port + 10_000 if self.saves else 0

    # ------------------------------------------------------------ telling
    def heartbeat(self, now: float) -> Heartbeat:
        """A whole snapshot."""
        self.sequence += 1
        gang, state = self.gang, self.state
        first = gang is not None and bool(self.ranks) and self.ranks[0].number == 0
        return Heartbeat(
            attempt=self.attempt,
            worker=self.worker,
            agent_id=f"agent-{self.port}",
            state=state,
            sequence=self.sequence,
            ranks=tuple(gang.report(rank, now) for rank in self.ranks) if gang and state is not AgentState.IDLE else (),
            standbys_ready=len(self.ranks),
            store_port=self.port,
            restored=gang.restored if gang and first else None,
            quarantined=gang.quarantined if gang and first else (),
            save=_save_report(gang, now) if gang and first else None,
            held=self.arena.held(now),
            pending=self.arena.pending(tuple(rank.number for rank in self.ranks), STEP_SECONDS, now),
            saver_port=self.saver_port,
            terminating=self.terminating,
        )


def _save_report(gang: Gang, now: float) -> SaveReport | None:
    if gang.committed is None and not gang.failures:
        return None
    age = now - gang.committed_at if gang.committed else 0.0
    error = "503 Slow Down" if gang.failures else ""
    return SaveReport(committed=gang.committed, committed_age_seconds=age, failures=gang.failures, error=error)


@dataclass(eq=False)
class Pod:
    """A pod object and, once it runs, the agent in it. `removed`: the API server knows it no more."""

    index: int
    attempt: int
    uid: str
    name: str
    created_at: float
    node: Node | None = None
    runs_at: float | None = None
    phase: PodPhase = PodPhase.PENDING
    agent: Agent | None = None
    deleted_at: float | None = None
    dies_at: float | None = None  # SIGKILL by the kubelet
    grace_seconds: float = 6.0
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    avoids: tuple[str, ...] = ()
    removed: bool = False

    @property
    def running(self) -> bool:
        """Its processes run, whatever the API server thinks."""
        return self.agent is not None and self.agent.exit_code is None and self.node is not None and self.node.alive

    def kill(self, now: float, code: int = 137) -> None:
        """All its processes at once."""
        if self.agent is not None:
            for rank in self.agent.ranks:
                rank.end(now, RankExit(signal=9))
            if self.agent.exit_code is None:
                self.agent.exit_code = code

    def fact(self, now: float) -> WorkerPod:
        """As `observe` would tell it."""
        return WorkerPod(
            index=self.index,
            name=self.name,
            uid=self.uid,
            phase=self.phase,
            ip=f"10.0.0.{self.index}" if self.agent else "",
            node=self.node.name if self.node else "",
            node_ready=self.node.ready if self.node else True,
            node_problems=self.node.problems if self.node else (),
            node_leaves=self.node.leaves if self.node else "",
            rack=self.node.rack if self.node else "",
            avoids=self.avoids,
            attempt=self.attempt,
            deleting=self.deleted_at is not None,
            age_seconds=now - self.created_at,
            exit_code=self.exit_code,
            reason=self.reason,
            message=self.message,
        )
