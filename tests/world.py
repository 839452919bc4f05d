"""A simulated cluster: nodes, kubelets, agents, ranks, an object store and mend's controller, with time moved by hand.

Nothing in here is random and nothing sleeps. The controller is the real thinking (`decide`) between a simulated
`observe` and a simulated `apply`; it is woken as the real one is, by news or when the time it asked for has come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from mend import dossier, render, strikes
from mend.actions import (
    AnyAction,
    CreateService,
    CreateTls,
    CreateToken,
    CreateWorker,
    Decision,
    DeleteRun,
    DeleteWorker,
    EmitEvent,
    KeepEvidence,
    LiftStrikes,
    PruneCheckpoints,
    SendCheck,
    SendGather,
    SendLaunch,
    SendSaveNow,
    SendStop,
    StrikeNode,
    SweepLeftovers,
)
from mend.crstatus import from_resource, to_resource
from mend.decide import decide
from mend.evidence import Evidence
from mend.heard import StepSamples, is_news
from mend.heartbeats import Heartbeat, RankExit
from mend.incidents import Origin, Strike
from mend.listing import StoredCheckpoint, StoreView
from mend.losses import LossWatch
from mend.observation import AgentView, Observation, PodPhase, WorkerPod
from mend.orders import Check, Checked, Gather, Launch, Order, SaveNow, Stop
from mend.spec import Spec, parse_spec
from mend.status import RunPhase, RunStatus
from simulated_faults import ENDS
from simulated_gang import Bucket, Gang, Rank, line_holds
from simulated_memory import Arena
from simulated_pod import Agent, Node, Pod

TICK = 0.1
SCHEDULING_SECONDS = 0.3
STARTING_SECONDS = 0.8
FORCED_KILL_SECONDS = 0.3
NODE_NEWS_SECONDS = 4.0
BROKEN_STREAM_SECONDS = 5.0
LISTING_SECONDS = 0.2
ALL = -1  # workers
EPOCH = 1_800_000_000.0
WHENCE = {
    Origin.RANKS: " from memory",
    Origin.MEMORY: " from the workers' own memory",
    Origin.PEER: " with copies of a buddy",
}


def a_spec(
    workers: int = 2,
    ranks: int = 2,
    *,
    minimum: int | None = None,
    spares: int = 0,
    health: dict[str, object] | None = None,
    **more: object,
) -> Spec:
    """A run's spec with short limits, so that simulated hours are not needed."""
    trainer = {"name": "trainer", "image": "clio:1", "command": ["python", "train.py"]}
    return parse_spec(
        {
            "workers": {
                "replicas": workers,
                "minReplicas": minimum if minimum is not None else workers,
                "ranksPerWorker": ranks,
                "spares": spares,
                "template": {"spec": {"containers": [trainer]}},
            },
            "checkpoint": {"uri": "s3://bucket/clio", "interval": "10 steps", "keepLast": 2},
            "health": {
                "lostAfter": "5s",
                "limits": {"start": "20s", "firstStep": "20s", "ceiling": "30s", "saving": "4s", "evaluating": "20s"},
                **(health or {}),
            },
            **more,
        }
    )


@dataclass
class Stream:
    """A controller's stream to one agent."""

    opened_at: float
    connected: bool = False
    problem: str = ""
    beat: Heartbeat | None = None
    heard_at: float = 0.0
    lost_at: float | None = None


@dataclass
class Controller:
    """One leader: what it holds in memory, all of which may be lost at any time."""

    streams: dict[str, Stream] = field(default_factory=dict)
    evidence: dict[int, Evidence] = field(default_factory=dict)
    checks: dict[int, Checked] = field(default_factory=dict)
    samples: StepSamples = field(default_factory=StepSamples)
    losses: LossWatch = field(default_factory=LossWatch)
    listing: StoreView = field(default_factory=StoreView)
    found: tuple[StoredCheckpoint, ...] = ()  # by the listing under way, as of its beginning
    listing_due: tuple[float, RunStatus] | None = None  # and the status when it began
    reported: dict[str, StoredCheckpoint] = field(default_factory=dict)
    wake_at: float | None = 0.0


class World:
    """The cluster with one TrainingRun in it."""

    def __init__(
        self,
        spec: Spec,
        *,
        nodes: int = 0,
        steps: int = 40,
        save_every: int = 10,
        memory: int = 0,
        rejoins: bool = False,
    ) -> None:
        self.now = EPOCH
        self.skew = 0.0  # of the controller's clock
        self.spec = spec
        self.steps, self.save_every, self.rejoins = steps, save_every, rejoins
        self.save_now, self.sweeps = "", 0
        self.memory = memory  # steps between snapshots; 0: none are taken
        self.generation = 1
        self.raw_status = "{}"
        self.version = 1
        self.nodes = [Node(f"node-{n}") for n in range(nodes or spec.workers.pods)]
        self.book: tuple[Strike, ...] = ()  # the strikes of all runs
        self.pods: list[Pod] = []
        self.gangs: dict[int, Gang] = {}
        self.bucket = Bucket()
        self.listing_seconds = LISTING_SECONDS
        self.controller: Controller | None = Controller()
        self.restart_at: float | None = None
        self.has_token = self.has_tls = self.has_service = False
        self.deleted = False
        self.next_uid = 0
        self.harmed_ranks: set[tuple[int, int]] = set()  # attempt, rank
        self.harmed_pods: set[str] = set()
        self.harmed_nodes: set[str] = set()  # where something was done to a rank or a pod
        self.seats: dict[tuple[int, int], str] = {}  # attempt, rank -> pod that it was launched in
        self.stale_pods: tuple[float, tuple[WorkerPod, ...]] | None = None
        self.cut: dict[int, float] = {}  # worker -> until when its stream is cut
        self.orders_fail_until = 0.0
        self.orders_double = False
        self.late_orders: list[tuple[float, str, Order]] = []
        self.orders_late_seconds = 0.0
        self.twice = False  # carry every action out twice
        self.wiped = False
        self.in_hand: list[tuple[float, Observation, Decision, int]] = []
        self.crash_point = ""  # "status" or "action": where the controller dies next
        self.decisions: list[tuple[Observation, Decision]] = []
        self.launches: dict[int, set[tuple[int, Launch]]] = {}
        self.trained: list[int] = []  # attempts in the order in which they made steps
        self.restored_wrongly: list[str] = []
        self.pruned: list[str] = []
        self.pruned_wrongly: list[str] = []
        self.kept: dict[str, bytes] = {}
        self.story: list[str] = []
        self.seen_status = RunStatus()

    # ------------------------------------------------------------ time
    def tick(self) -> None:
        """A tenth of a second goes by."""
        self.now = round(self.now + TICK, 3)
        self._nodes_change()
        for pod in list(self.pods):
            self._kubelet(pod)
        self._gangs_advance()
        self._copy_snapshots()
        for due, uid, order in [each for each in self.late_orders if each[0] <= self.now]:
            self.late_orders.remove((due, uid, order))
            self._deliver(uid, order)
        for each in [each for each in self.in_hand if each[0] <= self.now]:
            self.in_hand.remove(each)
            self.carry_out(*each[1:])
        if self.restart_at is not None and self.now >= self.restart_at:
            self.restart_at, self.controller = None, Controller()
        if self.stale_pods is not None and self.now >= self.stale_pods[0]:
            self.stale_pods = None
            self._news()
        if self.controller is not None:
            self._listen(self.controller)
            self._list(self.controller)
            if self.controller.wake_at is not None and self.now >= self.controller.wake_at:
                self.look()

    def run(self, seconds: float) -> World:
        """Lets time go by."""
        for _ in range(round(seconds / TICK)):
            self.tick()
        return self

    def until(self, holds: Callable[[World], bool], within: float = 300.0) -> World:
        """Lets time go by until something holds; fails if it takes too long."""
        for _ in range(round(within / TICK)):
            if holds(self):
                return self
            self.tick()
        raise AssertionError(
            f"not within {within:g} s: {self.status.phase}, {self.last_reason}\n" + "\n".join(self.story)
        )

    def until_step(self, step: int) -> World:
        """Until the current gang has completed this step."""
        return self.until(lambda world: world.gang is not None and world.gang.step >= step)

    def until_training(self) -> World:
        """Until the run is in phase Running."""
        return self.until(lambda world: world.status.phase is RunPhase.RUNNING)

    def until_end(self, within: float = 400.0) -> World:
        """Until the run has succeeded or failed."""
        return self.until(lambda world: world.status.phase.is_final, within)

    # ------------------------------------------------------------ what is
    @property
    def status(self) -> RunStatus:
        """What the API server holds."""
        return self.seen_status

    @property
    def gang(self) -> Gang | None:
        """The gang of the newest attempt, if it was launched."""
        return self.gangs.get(self.status.attempt)

    @property
    def last_reason(self) -> str:
        """Why the controller did what it did last."""
        return self.decisions[-1][1].reason if self.decisions else "nothing was decided"

    def live_ranks(self) -> list[Rank]:
        """The living ranks of the current gang, in order."""
        ranks = self.gang.ranks if self.gang is not None else {}
        return [ranks[number] for number in sorted(ranks) if ranks[number].alive]

    # ------------------------------------------------------------ harm
    def harm_rank(self, number: int, how: str) -> None:
        """One of `simulated_faults.ENDS`, or stop, or another of `STUCK`."""
        rank = next((each for each in self.live_ranks() if each.number == number), None)
        if rank is None or self.gang is None or (self.gang.finished and not self.gang.in_flight):
            return
        self.harmed_ranks.add((self.gang.attempt, number))
        seat = self.seats.get((self.gang.attempt, number))
        self.harmed_nodes |= {pod.node.name for pod in self.pods if pod.uid == seat and pod.node is not None}
        if how in ENDS:
            rank.end(self.now, *ENDS[how])
        else:
            rank.fault, rank.fault_at = {"stop": "stopped"}.get(how, how), self.now

    def harm_all(self, how: str) -> None:
        """The same to every rank, as a mistake of the training code does."""
        for rank in self.live_ranks():
            self.harm_rank(rank.number, how)

    def pause_worker(self, worker: int) -> None:
        """SIGSTOP to all its ranks, as a freezer does."""
        size = self.spec.workers.ranks_per_worker
        for number in range(worker * size, (worker + 1) * size):
            self.harm_rank(number, "stop")

    def raise_loss(self) -> None:
        """From its next step on something is wrong with the state of the gang; nobody stops for it."""
        if self.gang is not None:
            self.gang.spiked_at = self.gang.step + 1

    def break_network(self, *behind: int) -> None:
        """All ranks of the gang wait, for nobody's fault; these, one collective before the others."""
        if self.gang is not None:
            self.gang.network_down, self.gang.behind = True, frozenset(behind)

    def repair_network(self) -> None:
        """The collective that all wait in goes on."""
        if self.gang is not None:
            self.gang.network_down = False

    def lose_node(self, worker: int, back_after: float | None = 15.0) -> None:
        """The machine under a worker dies; another takes its place after a while."""
        pods = [pod for pod in self.pods if pod.index == worker and not pod.removed and pod.node is not None]
        for pod in pods[-1:]:
            assert pod.node is not None
            pod.node.alive, pod.node.changes_at = False, self.now + NODE_NEWS_SECONDS
            for each in self.pods:
                if each.node is pod.node:
                    self._harm(each)
                    each.kill(self.now)
            if back_after is not None:
                self.nodes.append(
                    Node(f"node-{len(self.nodes)}", alive=False, ready=False, changes_at=self.now + back_after)
                )

    def kill_agent(self, worker: int) -> None:
        """PID 1 of the pod dies."""
        for pod in self._pods_of(worker):
            self._harm(pod)
            if pod.running:
                pod.kill(self.now)

    def freeze_agent(self, worker: int) -> None:
        """PID 1 of the pod is stopped; its ranks go on."""
        for pod in self._pods_of(worker):
            self._harm(pod)
            if pod.agent is not None:
                pod.agent.frozen = True

    def preempt(self, worker: int, grace_seconds: float = 6.0) -> None:
        """Somebody deletes the pod."""
        for pod in self._pods_of(worker):
            self._harm(pod)
            self._delete_pod(pod, grace_seconds)
            self._news()

    def make_node_ill(self, worker: int, problem: str) -> None:
        """Whoever watches machines says that there is something wrong with the one under a worker."""
        for pod in self._pods_of(worker):
            if pod.node is not None:
                pod.node.problems = (problem,)
                self.harmed_nodes.add(pod.node.name)
        self._news()

    def make_nodes_well(self) -> None:
        """Whoever watches machines has no more complaints."""
        for node in self.nodes:
            node.problems = ()
        self._news()

    def slow_memory(self, worker: int) -> None:
        """The machine under a worker does a third of what the others do; nobody has noticed."""
        for pod in self._pods_of(worker):
            if pod.node is not None:
                pod.node.memory_share = 0.3
                self.harmed_nodes.add(pod.node.name)

    def _harm(self, pod: Pod) -> None:
        self.harmed_pods.add(pod.uid)
        if pod.node is not None:
            self.harmed_nodes.add(pod.node.name)

    def cut_streams(self, seconds: float, *workers: int) -> None:
        """The controller cannot reach these agents (all, if none is named)."""
        for worker in workers or (ALL,):
            self.cut[worker] = self.now + seconds

    def spoil_newest(self) -> None:
        """A bit flips in the newest checkpoint."""
        if (newest := self.bucket.newest()) is not None:
            self.bucket.corrupt.add(newest.ref.uri)

    def spoil_snapshots(self) -> None:
        """A bit flips in the newest snapshots, and in their copies."""
        told = [each.state.ref for pod in self.pods if pod.agent for each in pod.agent.arena.snapshots()]
        if told:
            self.bucket.corrupt.add(max(told, key=lambda ref: (ref.attempt, ref.step)).uri)

    def slow_savers(self, digest_seconds: float) -> None:
        """Savers take so long to take the digests of a snapshot."""
        for pod in self.pods:
            if pod.agent is not None:
                pod.agent.arena.digest_seconds = digest_seconds

    def kill_saver(self, worker: int, seconds: float = 2.0) -> None:
        """The saver of a worker dies; the agent starts another."""
        for pod in self._pods_of(worker):
            if pod.agent is not None and pod.agent.saves:
                pod.agent.saver_back_at = self.now + seconds

    def announce_end_of_node(self, worker: int, notice: str) -> None:
        """The cloud says that the machine under a worker will soon be gone."""
        for pod in self._pods_of(worker):
            if pod.node is not None:
                pod.node.leaves = notice
        self._news()

    def kill_controller(self, point: str = "", down_for: float = 1.0) -> None:
        """It dies now, or ("status", "action") right after its next write of a new status, or its next action."""
        if point:
            self.crash_point = point
        elif self.controller is not None:
            self.controller = None
            self.restart_at = round(self.now + down_for, 3)

    def put_in_hand(self, seconds: float) -> None:
        """A leader that decides now falls asleep before it acts, is replaced, and acts when it wakes."""
        if self.controller is not None:
            seen = self.observe(self.controller)
            decision = decide(self.spec, seen, self.now + self.skew)
            self.in_hand.append((self.now + seconds, seen, decision, self.version))

    def edit(self, spec: Spec) -> None:
        """kubectl apply."""
        if spec != self.spec:
            self.spec = spec
            self.generation += 1
            self._news()

    def suspend(self, suspended: bool = True) -> None:
        """Sets spec.suspend."""
        self.edit(replace(self.spec, suspend=suspended))

    def scale(self, replicas: int) -> None:
        """Sets spec.workers.replicas, with nodes enough."""
        workers = replace(
            self.spec.workers, replicas=replicas, min_replicas=min(replicas, self.spec.workers.min_replicas)
        )
        while len([node for node in self.nodes if node.alive]) < replicas:
            self.nodes.append(Node(f"node-{len(self.nodes)}"))
        self.edit(replace(self.spec, workers=workers))

    def wipe_status(self) -> None:
        """Somebody deletes the status."""
        self.raw_status, self.seen_status, self.version = "{}", RunStatus(), self.version + 1
        self.wiped = True
        self._news()

    def heal(self) -> None:
        """From now on nothing is broken any more but what broke."""
        self.cut.clear()
        self.orders_fail_until = self.orders_late_seconds = 0.0
        self.orders_double, self.crash_point, self.stale_pods, self.bucket.available = False, "", None, True
        for node in self.nodes:
            node.problems, node.leaves = (), ""
            if node.alive:
                node.ready, node.changes_at = True, None
        while len([node for node in self.nodes if node.alive]) < self.spec.workers.replicas:
            self.nodes.append(Node(f"node-{len(self.nodes)}"))
        self.suspend(False)

    def is_guilty(self, attempt: int, rank: int) -> bool:
        """Whether this rank, or the pod that it was in, was harmed."""
        return (attempt, rank) in self.harmed_ranks or self.seats.get((attempt, rank)) in self.harmed_pods

    def _reaches(self, worker: int) -> bool:
        return all(self.cut.get(each, 0.0) <= self.now for each in (worker, ALL))

    def _pods_of(self, worker: int) -> list[Pod]:
        return [pod for pod in self.pods if pod.index == worker and not pod.removed]

    # ------------------------------------------------------------ nodes and kubelets
    def _nodes_change(self) -> None:
        for node in self.nodes:
            if node.changes_at is not None and self.now >= node.changes_at:
                node.changes_at = None
                if node.ready:
                    node.ready = False
                else:
                    node.alive = node.ready = True
                self._news()

    def _kubelet(self, pod: Pod) -> None:
        if pod.node is None:
            self._schedule(pod)
            return
        if not pod.node.alive:
            return
        if pod.agent is None and pod.deleted_at is None and pod.runs_at is not None and self.now >= pod.runs_at:
            self.next_uid += 1
            pod.agent = Agent(pod.index, 30_000 + self.next_uid, saves=self.memory > 0)
            pod.phase = PodPhase.RUNNING
            self._news()
        if pod.agent is not None and pod.agent.exit_code is None and not pod.agent.frozen:
            pod.agent.live(self.now)
        if pod.dies_at is not None and self.now >= pod.dies_at:
            pod.kill(self.now)
        self._bury(pod)

    def _bury(self, pod: Pod) -> None:
        ended = pod.agent is not None and pod.agent.exit_code is not None
        if ended and pod.agent is not None and pod.phase is PodPhase.RUNNING:
            for rank in pod.agent.ranks:
                rank.end(self.now, RankExit(signal=9))
            pod.exit_code = pod.agent.exit_code
            pod.phase = PodPhase.SUCCEEDED if pod.exit_code == 0 else PodPhase.FAILED
            self._news()
        if pod.deleted_at is not None and (ended or pod.agent is None):
            pod.removed = True
        if pod.removed and (ended or pod.agent is None):
            self.pods.remove(pod)
            self._news()

    def _schedule(self, pod: Pod) -> None:
        if pod.deleted_at is not None:
            self.pods.remove(pod)
            self._news()
            return
        if self.now - pod.created_at < SCHEDULING_SECONDS:
            return
        taken = {
            each.node.name
            for each in self.pods
            if each.node is not None and each.phase in (PodPhase.PENDING, PodPhase.RUNNING)
        }
        free = [node for node in self.nodes if node.alive and node.ready and node.name not in taken]
        fit = [node for node in free if node.name not in pod.avoids]
        if fit:
            pod.node, pod.runs_at = fit[0], self.now + STARTING_SECONDS
            pod.reason = pod.message = ""
        elif not pod.reason:
            why = f"{len(free)} node(s) didn't match Pod's node affinity/selector" if free else "there is none"
            pod.reason, pod.message = "Unschedulable", f"0/{len(self.nodes)} nodes are available: {why}."
            self._news()
        elif free:
            pod.message = (
                f"0/{len(self.nodes)} nodes are available: 1 node(s) didn't match Pod's node affinity/selector"
            )

    def _delete_pod(self, pod: Pod, grace_seconds: float) -> None:
        if grace_seconds == 0:
            pod.removed = True
            pod.dies_at = self.now + FORCED_KILL_SECONDS
            if pod.node is None or not pod.node.alive:
                self.pods.remove(pod)
        deadline = self.now + grace_seconds
        pod.dies_at = deadline if pod.dies_at is None else min(pod.dies_at, deadline)
        if pod.deleted_at is None:
            pod.deleted_at = self.now
            if pod.running and pod.agent is not None and not pod.agent.frozen:
                pod.agent.terminate(self.now, grace_seconds)
        self._news()

    def _gangs_advance(self) -> None:
        for attempt in sorted(self.gangs):
            gang = self.gangs[attempt]
            before = gang.restored
            if gang.advance(self.now):
                self.trained.append(attempt)
            if before is None and gang.restored is not None and gang.restored.step >= 0:
                self._check_restore(gang)

    def _copy_snapshots(self) -> None:
        for pod in self.pods:
            if pod.running and pod.agent is not None and pod.agent.saver_back_at is None:
                buddy = self._served_at(pod.agent.buddy)
                if buddy is not None:
                    pod.agent.arena.copy_to(buddy, self.now)

    def _served_at(self, url: str) -> Arena | None:
        """What a saver serves, if it is there."""
        agent = self._agent_at(url)
        return agent.arena if agent is not None and agent.saver_back_at is None else None

    def _has_no_saver(self, url: str) -> bool:
        """Whether whoever asks there hears nothing yet."""
        agent = self._agent_at(url)
        return agent is not None and agent.saver_back_at is not None

    def _agent_at(self, url: str) -> Agent | None:
        port = int(url.rpartition(":")[2] or 0)  # no two agents have the same
        living = (pod.agent for pod in self.pods if port and pod.running and pod.agent is not None)
        return next((agent for agent in living if agent.saver_port == port), None)

    def _check_restore(self, gang: Gang) -> None:
        """Notes a restore of a state that the run was never in, or gave up."""
        assert gang.restored is not None
        earlier = [self.gangs[attempt] for attempt in self.trained if attempt < gang.attempt]
        last = max(earlier, key=lambda each: each.attempt, default=None)
        if gang.restored.is_of_peers:
            # As it was in the last gang that trained, or in one that came after it and never made a step.
            giver = self.gangs[gang.restored.attempt]
            held = last is not None and giver.attempt >= last.attempt and gang.restored.step == giver.step
        else:
            assert gang.began_from is not None
            held = last is None or line_holds(gang.began_from, last)
        if not held:
            self.restored_wrongly.append(f"attempt {gang.attempt} restored {gang.restored}")

    # ------------------------------------------------------------ the controller's eyes
    def _news(self) -> None:
        if self.controller is not None:
            self.controller.wake_at = self.now

    def _listen(self, controller: Controller) -> None:
        uids = {
            pod.uid for pod in self.pods if not pod.removed and pod.agent is not None and pod.phase is PodPhase.RUNNING
        }
        controller.streams = {uid: stream for uid, stream in controller.streams.items() if uid in uids}
        for pod in self.pods:
            if pod.uid in uids:
                self._hear(controller, pod, controller.streams.setdefault(pod.uid, Stream(self.now)))

    def _hear(self, controller: Controller, pod: Pod, stream: Stream) -> None:
        assert pod.agent is not None
        assert pod.node is not None
        if self.cut.get(pod.index, 0.0) > self.now:
            self._harm(pod)
        if not self._reaches(pod.index) or not pod.node.alive:
            stream.lost_at = stream.lost_at or self.now
            if stream.connected and self.now - stream.lost_at > BROKEN_STREAM_SECONDS:
                stream.connected, stream.problem = False, "timed out"
                self._news()
            return
        stream.lost_at = None
        if not pod.running:
            if stream.connected or stream.problem != "refused":
                stream.connected, stream.problem = False, "refused"
                self._news()
            return
        if pod.agent.frozen:
            return
        if not stream.connected:
            stream.connected, stream.problem = True, ""
            self._news()
        self._beat(controller, pod.agent, stream)

    def _beat(self, controller: Controller, agent: Agent, stream: Stream) -> None:
        beat = agent.heartbeat(self.now)
        if is_news(stream.beat, beat):
            self._news()
        elif self.now - stream.heard_at < self.spec.health.heartbeat_seconds:
            return
        stream.beat, stream.heard_at = beat, self.now
        controller.samples.add(beat)
        gang = self.gangs.get(beat.attempt)
        if gang is not None and any(rank.rank == 0 for rank in beat.ranks):
            controller.losses.add(beat.attempt, gang.points, self.spec.health.loss_spike)

    def _list(self, controller: Controller) -> None:
        """As `Prefixes`: anew at first sight, for each attempt, once replaced pods are gone, and after a problem."""
        known, status = controller.listing, self.status
        current = known.listed_for == status.attempt and set(known.listed_beside) <= set(status.replacing)
        if (not known.listed or not current or known.problem) and controller.listing_due is None:
            controller.listing_due = (self.now + self.listing_seconds, status)
            controller.found = tuple(self.bucket.checkpoints.values())
        if controller.listing_due is None or self.now < controller.listing_due[0]:
            return
        _, begun = controller.listing_due
        controller.listing_due = None
        before = controller.listing
        if not self.bucket.available:
            controller.listing = replace(before, problem="503 Slow Down", problem_reason="Unreachable")
        else:
            controller.listing = StoreView(
                listed=True,
                checkpoints=controller.found,
                listed_for=begun.attempt,
                listed_beside=begun.replacing,
            )
            found = {each.ref.uri for each in controller.found}
            controller.reported = {uri: each for uri, each in controller.reported.items() if uri not in found}
        if controller.listing != before:
            self._news()

    def _store_view(self, controller: Controller, status: RunStatus) -> StoreView:
        spoilt: set[str] = set()
        verified: set[str] = set()
        current = status.attempt if status.follows is None else status.follows
        for stream in controller.streams.values():
            beat = stream.beat
            if beat is None:
                continue
            spoilt.update(beat.quarantined)
            if beat.restored is not None:
                verified.add(beat.restored.uri)
            if beat.save is not None and (ref := beat.save.committed) is not None and beat.attempt == current:
                controller.reported.setdefault(
                    ref.uri, StoredCheckpoint(ref=ref, run_uid="run-uid", lineage=status.lineage)
                )
        known = {each.ref.uri: each for each in (*controller.reported.values(), *controller.listing.checkpoints)}
        checkpoints = tuple(
            replace(each, quarantined=each.quarantined or uri in spoilt, verified=each.verified or uri in verified)
            for uri, each in sorted(known.items())
            if uri not in self.pruned
        )
        return replace(controller.listing, checkpoints=checkpoints)

    def observe(self, controller: Controller) -> Observation:
        """Everything the controller knows now."""
        status = self.status
        if status.attempt > controller.samples.attempt:
            controller.samples = StepSamples(status.attempt)
        controller.evidence = {n: told for n, told in controller.evidence.items() if told.attempt >= status.attempt}
        return Observation(
            name="clio",
            namespace="team",
            uid="run-uid",
            generation=self.generation,
            created_at=EPOCH,
            status=status,
            pods=self._visible_pods(),
            agents=tuple(self._views(controller)),
            evidence=tuple(controller.evidence.values()),
            checks=tuple(controller.checks.values()),
            store=self._store_view(controller, status),
            strikes=self.book,
            step_times=controller.samples.times(),
            losses=controller.losses.standing(status.attempt),
            has_service=self.has_service,
            has_token=self.has_token,
            has_tls=self.has_tls,
            deleting=self.deleted,
            save_now=self.save_now,
        )

    def _visible_pods(self) -> tuple[WorkerPod, ...]:
        if self.stale_pods is not None:
            return self.stale_pods[1]
        return tuple(pod.fact(self.now) for pod in self.pods if not pod.removed)

    def see_stale_pods(self, seconds: float) -> None:
        """The watch of pods stands still for a while."""
        self.stale_pods = (self.now + seconds, self._visible_pods())

    def _views(self, controller: Controller) -> Iterator[AgentView]:
        for pod in self.pods:
            stream = controller.streams.get(pod.uid)
            if stream is not None:
                yield AgentView(
                    worker=pod.index,
                    pod_uid=pod.uid,
                    connected=stream.connected,
                    silent_seconds=round(self.now - (stream.heard_at or stream.opened_at), 3),
                    heartbeat=stream.beat,
                    problem=stream.problem,
                )

    # ------------------------------------------------------------ the controller's hands
    def look(self) -> None:
        """Observe, decide, write the status, act."""
        controller = self.controller
        assert controller is not None
        seen = self.observe(controller)
        decision = decide(self.spec, seen, self.now + self.skew)
        self.decisions.append((seen, decision))
        controller.wake_at = None if decision.wake_after is None else self.now + max(TICK, decision.wake_after)
        self.carry_out(seen, decision, self.version)

    def carry_out(self, seen: Observation, decision: Decision, version: int) -> None:
        """The status first, unless it was changed meanwhile; then the actions."""
        changed = decision.status != seen.status
        if changed:
            if version != self.version:
                return
            self._write(decision.status)
            if self.crash_point == "status" and decision.actions:
                self._crash()
                return
        for action in decision.actions:
            self._act(seen, action)
            if self.twice:
                self._act(seen, action)
            if self.crash_point == "action":
                self._crash()
                return

    def _crash(self) -> None:
        self.crash_point = ""
        self.kill_controller(down_for=0.5)

    def _write(self, status: RunStatus) -> None:
        self._tell(self.seen_status, status)
        size = self.spec.workers.ranks_per_worker
        for place, worker in enumerate(status.participants):
            for rank in range(place * size, (place + 1) * size):
                uids = [pod.uid for pod in self.pods if pod.index == worker and not pod.removed]
                self.seats.setdefault((status.attempt, rank), uids[-1] if uids else "")
        self.raw_status = json.dumps(to_resource(status))
        self.seen_status = from_resource(json.loads(self.raw_status))
        self.version += 1

    def _act(self, seen: Observation, action: AnyAction) -> None:
        match action:
            case CreateToken():
                self.has_token = True
                self._news()
            case CreateTls():
                self.has_tls = True
                self._news()
            case CreateService():
                self.has_service = True
                self._news()
            case CreateWorker():
                self._create(seen, action)
            case StrikeNode(strike=strike):
                self._rewrite_book(strikes.struck(self.book, strike))
            case LiftStrikes(ids=ids):
                self._rewrite_book(strikes.lifted(self.book, ids))
            case DeleteWorker():
                for pod in [each for each in self.pods if each.uid == action.uid and not each.removed]:
                    self._delete_pod(pod, 6.0 if action.grace_seconds is None else action.grace_seconds)
            case SendLaunch(pod_uid=uid, launch=launch):
                self.launches.setdefault(launch.attempt, set()).add((action.worker, _frozen(launch)))
                self._send(uid, launch)
            case SendCheck(pod_uid=uid, attempt=attempt, seconds=seconds):
                self._send(uid, Check(attempt=attempt, round=action.round, seconds=seconds))
            case SendSaveNow(pod_uid=uid, attempt=attempt):
                self._send(uid, SaveNow(attempt=attempt))
            case SendGather(pod_uid=uid, attempt=attempt, seconds=seconds):
                self._send(uid, Gather(attempt=attempt, seconds=seconds))
            case SendStop(pod_uid=uid):
                order = Stop(
                    attempt=action.attempt,
                    grace_seconds=action.grace_seconds,
                    exit=action.exit,
                    exit_code=action.exit_code,
                )
                self._send(uid, order)
            case KeepEvidence(key=key, record=record):
                self.kept[key] = dossier.encode(dossier.compose(seen, record))
            case PruneCheckpoints(uris=uris):
                self._prune(uris)
            case SweepLeftovers():
                self.sweeps += 1
            case DeleteRun():
                self.deleted = True
            case EmitEvent():
                pass

    def _rewrite_book(self, book: tuple[Strike, ...]) -> None:
        for each in book:
            was = next((one for one in self.book if one.id == each.id), None)
            if was is None:
                self._say(f"strike against {each.node}: {each.reason}")
            elif each.lifted and not was.lifted:
                self._say(f"strike against {each.node} is lifted")
        if book != self.book:
            self.book = book
            self._news()

    def _create(self, seen: Observation, action: CreateWorker) -> None:
        index, attempt = action.index, action.attempt
        body = render.worker(self.spec, seen, index, attempt, action.avoid)
        name = body["metadata"]["name"]
        if any(pod.name == name and not pod.removed for pod in self.pods):
            return
        self.next_uid += 1
        self.pods.append(Pod(index, attempt, f"pod-{self.next_uid}", name, self.now, avoids=action.avoid))
        self._news()

    def _send(self, uid: str, order: Order) -> None:
        if self.now < self.orders_fail_until:
            return
        if self.orders_late_seconds:
            self.late_orders.append((self.now + self.orders_late_seconds, uid, order))
            return
        self._deliver(uid, order)
        if self.orders_double:
            self.late_orders.append((self.now + 2.0, uid, order))

    def _deliver(self, uid: str, order: Order) -> None:
        pod = next((each for each in self.pods if each.uid == uid), None)
        if pod is None or not pod.running or pod.agent is None or pod.agent.frozen:
            return
        if not self._reaches(pod.index):
            return
        answer = pod.agent.obey(order, self.now, self.gangs, self._new_gang)
        if isinstance(answer, Checked) and self.controller is not None and pod.node is not None:
            figures = {"cpu matrix product": 1e11, "cpu memory pass": 1e10 * pod.node.memory_share}
            self.controller.checks[pod.index] = replace(answer, figures=figures)
            self._news()
        if isinstance(answer, Evidence) and self.controller is not None:
            self.controller.evidence[pod.index] = answer
            self._news()

    def _new_gang(self, launch: Launch) -> Gang:
        gang = Gang(launch, self.bucket, self.steps - 1, self.save_every, rejoins=self.rejoins)
        gang.memory_every, gang.fetch, gang.is_silent = self.memory, self._served_at, self._has_no_saver
        return gang

    def _prune(self, uris: tuple[str, ...]) -> None:
        needed = self.gangs[max(self.gangs)].may_need() if self.gangs else frozenset()
        self.pruned_wrongly += [f"{uri} of attempt {max(self.gangs)}" for uri in uris if uri in needed]
        for uri in uris:
            if self.bucket.checkpoints.pop(uri, None) is not None:
                self.pruned.append(uri)

    # ------------------------------------------------------------ the story
    def _tell(self, before: RunStatus, after: RunStatus) -> None:
        """What a status that is written says, a line for each thing that happened."""
        old = {each.id: each for each in before.incidents}
        for each in after.incidents:
            was = old.get(each.id)
            if each.tier is not None and (was is None or was.tier is None):
                blamed = f"blames {_numbers('rank', each.culprit_ranks)}" if each.culprit_ranks else "blames nobody"
                self._say(f"{each.kind} after step {each.step}: {blamed}, {each.tier}: {each.summary}")
            if each.recovered_at is not None and each.tier is None and was is not None and was.is_open:
                self._say(f"{each.summary}")
            elif each.recovered_at is not None and (was is None or was.is_open):
                self._say(f"back from incident {each.id}, {each.steps_lost} steps lost")
            for reason in each.reasons[len(was.reasons) if was is not None else 0 :]:
                if reason.startswith("node check"):
                    self._say(reason)
        if after.attempt != before.attempt:
            self._say(f"attempt {after.attempt}")
        if after.check is not None and after.check.asked and not (before.check and before.check.asked):
            self._say(f"checks {_numbers('worker', after.check.asked)}: {after.check.why}")
        if after.participants and (after.participants, after.attempt) != (before.participants, before.attempt):
            source = (
                f"step {after.restore[0].step} of attempt {after.restore[0].attempt}" if after.restore else "scratch"
            )
            source += " in memory" if after.restore and after.restore[0].save_in_memory else ""
            self._say(f"launch on {_numbers('worker', after.participants)} from {source}")
        if after.restored_step is not None and before.restored_step is None:
            self._say(f"restored step {after.restored_step}{WHENCE.get(after.origin, '')}")
        for notice in after.notices:
            if notice not in before.notices:
                self._say(f"saves early: {notice}")
        if after.saving_until is not None and before.saving_until is None:
            self._say("saves to change its size")
        if after.phase is not before.phase and after.phase not in (RunPhase.PENDING, RunPhase.RECOVERING):
            failed = next((each for each in after.conditions if each.type == "Failed"), None)
            why = f": {failed.reason}: {failed.message.splitlines()[0]}" if failed is not None else ""
            after_step = "" if after.phase is RunPhase.RUNNING else f" after step {after.step}"
            self._say(f"{after.phase}{after_step}{why}")
        was_ok = {each.type: each.reason for each in before.conditions}
        for each in after.conditions:
            if (
                each.type == "StorageReady"
                and each.status == "False"
                and was_ok.get(each.type) != each.reason != "Unknown"
            ):
                self._say(f"storage: {each.reason}: {each.message}")

    def _say(self, line: str) -> None:
        self.story.append(re.sub(r"\d+(\.\d+)? s\b", "… s", line))


def _frozen(launch: Launch) -> Launch:
    """The launch without its only unhashable part."""
    return _Hashable(**{name: getattr(launch, name) for name in launch.__struct_fields__})


class _Hashable(Launch, frozen=True, kw_only=True, tag="launch"):
    def __hash__(self) -> int:
        return hash((self.attempt, self.first_rank, self.restore, self.master_addr, self.master_port))


def _numbers(noun: str, numbers: tuple[int, ...]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
