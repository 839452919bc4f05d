"""Everything that is seen of a run when it is looked at: its pods, its agents, its store, what it has learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cached_property

from msgspec.structs import replace

from mend.evidence import Evidence
from mend.facts import Fact
from mend.heartbeats import Heartbeat, RankReport
from mend.incidents import Strike
from mend.learnt import LossStanding, Pace, StepTimes
from mend.listing import StoreView
from mend.orders import Checked
from mend.status import Evaluation, RunStatus


class PodPhase(StrEnum):
    """As in Kubernetes."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


class WorkerPod(Fact, frozen=True, kw_only=True):
    """A pod of the run as the API server tells."""

    index: int
    name: str
    uid: str
    phase: PodPhase = PodPhase.PENDING
    ip: str = ""
    node: str = ""
    node_ready: bool = True
    node_problems: tuple[str, ...] = ()  # conditions and taints that speak of a broken machine, in words
    node_conditions: tuple[str, ...] = ()  # "Type=Status" of those that are not as on every healthy node
    node_leaves: str = ""  # the condition or taint that says that its node will soon be gone
    rack: str = ""  # what its node shares with others that may fail with it; "": no label tells
    avoids: tuple[str, ...] = ()  # nodes that it was made to keep away from
    attempt: int = 0  # label: the attempt it was made for
    deleting: bool = False
    age_seconds: float = 0.0
    exit_code: int | None = None
    reason: str = ""  # of the pod or its trainer container: Evicted, Preempting, OOMKilled, ErrImagePull...
    message: str = ""
    log_tail: tuple[str, ...] = ()


class AgentView(Fact, frozen=True, kw_only=True):
    """What the stream to one agent tells; `heartbeat` may be old: see `silent_seconds`."""

    worker: int
    pod_uid: str
    connected: bool
    silent_seconds: float
    heartbeat: Heartbeat | None = None
    problem: str = ""  # why it is not connected: refused, unauthorized, ...


class Observation(Fact, frozen=True, kw_only=True, dict=True):  # a __dict__ for what is found out once
    """Everything that a decision about one run may depend on, besides its spec and `now`."""

    name: str
    namespace: str
    uid: str
    generation: int
    created_at: float
    status: RunStatus
    pods: tuple[WorkerPod, ...] = ()
    agents: tuple[AgentView, ...] = ()
    evidence: tuple[Evidence, ...] = ()  # gathered in the current attempt
    checks: tuple[Checked, ...] = ()  # of machines, before the current attempt
    store: StoreView = StoreView()
    step_times: StepTimes = StepTimes()
    paces: tuple[Pace, ...] = ()  # of the ranks of which it is known, in rank order
    losses: LossStanding | None = None  # None while too few points are known
    evaluations: tuple[Evaluation, ...] = ()  # of the metric of spec.checkpoint.keepBest, in this attempt
    save_now: str = ""  # the annotation that asks for a save
    has_service: bool = False
    has_token: bool = False
    has_tls: bool = False  # the Secret with the run's key and certificate
    deleting: bool = False
    spec_problems: tuple[str, ...] = ()  # of the spec as it is now; decided is then on the last accepted one
    strikes: tuple[Strike, ...] = ()  # of all runs, as the book of strikes has them
    predecessors: tuple[str, ...] = ()  # pods that a run of this name, now deleted, has left: they may yet save

    def pod_of(self, worker: int) -> WorkerPod | None:
        """The pod that stands for this worker now: the newest that is not to be replaced."""
        return self._standing.get(worker)

    def agent_of(self, worker: int) -> AgentView | None:
        """The stream to the agent in that very pod."""
        pod = self.pod_of(worker)
        return self._agents_by_pod.get(pod.uid) if pod else None

    def connected(self, workers: Iterable[int]) -> Iterator[AgentView]:
        """The agents of these workers that can be given orders."""
        agents = map(self.agent_of, workers)
        return (agent for agent in agents if agent is not None and agent.connected)

    def heartbeat_of(self, worker: int) -> Heartbeat | None:
        """The worker's last snapshot, if it is about the current attempt."""
        agent = self.agent_of(worker)
        beat = agent.heartbeat if agent else None
        return beat if beat and beat.attempt == self.status.attempt else None

    @cached_property
    def _standing(self) -> dict[int, WorkerPod]:
        staying = [pod for pod in self.pods if pod.uid not in self.status.replacing]
        return {pod.index: pod for pod in sorted(staying, key=lambda pod: (not pod.deleting, pod.attempt))}

    @cached_property
    def _agents_by_pod(self) -> dict[str, AgentView]:
        return {each.pod_uid: each for each in self.agents}

    @cached_property
    def ranks(self) -> tuple[RankReport, ...]:
        """Every rank of the current attempt that is known of, in rank order, its ages carried on to now."""
        reports = [
            _carried_on(rank, agent.silent_seconds)
            for worker in self.status.participants
            if (agent := self.agent_of(worker)) and (beat := self.heartbeat_of(worker))
            for rank in beat.ranks
        ]
        return tuple(sorted(reports, key=lambda rank: rank.rank))


def _carried_on(rank: RankReport, seconds: float) -> RankReport:
    """The report as of `seconds` later: only then can ages that came with different heartbeats be compared."""
    return replace(
        rank,
        progress_seconds=rank.progress_seconds + seconds,
        phase_seconds=rank.phase_seconds + seconds,
        exit=rank.exit and replace(rank.exit, age_seconds=rank.exit.age_seconds + seconds),
        error=rank.error and replace(rank.error, age_seconds=rank.error.age_seconds + seconds),
    )
