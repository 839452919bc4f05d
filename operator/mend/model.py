"""The facts that thinking works on: what is seen of a run, what is wrong with it, what is to be done about it.

Everything here is frozen and turns into JSON and back, so that a line of the journal holds a whole decision.
`now` and every `..._at` are seconds since the epoch by the controller's clock; ages are in seconds.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property

import msgspec
from msgspec.structs import replace

from mend.protocol import Ancestor, Checked, CheckpointRef, Evidence, Heartbeat, Launch, Phase, RankReport


class Fact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Base of all facts: immutable, keyword-only, written in the API's camelCase with defaults left out."""


# ---------------------------------------------------------------- status: what the controller remembers, in the CR
class RunPhase(StrEnum):
    """Where a run is in its life."""

    PENDING = "Pending"  # workers are being made, nothing has trained in this attempt yet
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def is_final(self) -> bool:
        """Nothing will change any more."""
        return self in (RunPhase.SUCCEEDED, RunPhase.FAILED)


class IncidentKind(StrEnum):
    """What can go wrong with a run."""

    CRASHED = "crashed"  # a rank's process ended although it should not
    HUNG = "hung"  # the gang makes no progress beyond the limit
    LOST = "lost"  # a worker is silent and gone
    PREEMPTED = "preempted"  # a worker was told to go by somebody else than mend
    CORRUPT = "corrupt"  # a checkpoint failed verification and none could be restored
    DIVERGED = "diverged"  # the loss is no longer a number, or far above what it was


class FailureClass(StrEnum):
    """Which budget an incident is paid from."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    HANG = "hang"
    PREEMPTION = "preemption"


class Tier(StrEnum):
    """How to recover, least disruptive first."""

    REJOIN = "rejoin"  # the culprits alone are killed; the other ranks go on in their processes
    RESTART_RANKS = "restart-ranks"  # same pods, all ranks killed, standbys take over
    REPLACE_WORKER = "replace-worker"  # a spare or a new pod takes its place, the others restart their ranks in place
    EXCLUDE_NODE = "exclude-node"  # the same, and the worker's node is kept away from
    ROLL_BACK = "roll-back"  # restart from a checkpoint before the newest
    GIVE_UP = "give-up"


class Origin(StrEnum):
    """Where the state lies, or lay, that an attempt begins with: from the nearest on."""

    RANKS = "ranks"  # that rejoined, and had it in their processes
    MEMORY = "memory"  # snapshots in the workers' own memory
    PEER = "peer"  # the same, but some of them copies that a buddy kept
    STORE = "store"  # a checkpoint


class Verdict(Fact, frozen=True, kw_only=True):
    """Who did it: `ranks` is empty for `unknown`. `reasons` are sentences that a person can check."""

    ranks: tuple[int, ...] = ()
    confidence: float = 0.0  # 0..1
    reasons: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether anybody is named."""
        return bool(self.ranks)


class Incident(Fact, frozen=True, kw_only=True):
    """Something that is wrong now, as `diagnose` sees it."""

    kind: IncidentKind
    failure: FailureClass
    attempt: int
    ranks: tuple[int, ...]  # in which it shows
    workers: tuple[int, ...]  # which are affected: for lost and preempted, the ones that go
    age_seconds: float  # how long ago it began, as far as it can be told
    verdict: Verdict
    summary: str  # the evidence in one line
    fatal: bool = False  # trying again cannot help
    needs_evidence: bool = False  # the verdict may improve by a `Gather`
    patience_seconds: float = 0.0  # how much longer the gang may yet go on by itself: nobody is killed before
    awaiting: str = ""  # what is about to make another incident of it, and is waited for with that patience
    fingerprint: str = ""  # equal for the same user error at the same step
    of_the_store: bool = False  # another machine would fare no better
    before_stepping: bool = False  # no step is known at which it happened: the process had not completed one
    sound_before: int | None = None  # checkpoints of this step and later may hold what is wrong; None: the newest may
    machine_faults: dict[int, str] = {}  # by worker: why its machine, rather than what runs there, is at fault


class IncidentRecord(Fact, frozen=True, kw_only=True):
    """An incident in the status: what was seen, what was done, what it cost."""

    id: int
    kind: IncidentKind
    failure: FailureClass
    attempt: int
    step: int  # last step that the gang had completed
    culprit_ranks: tuple[int, ...] = ()
    culprit_workers: tuple[int, ...] = ()
    culprit_nodes: tuple[str, ...] = ()  # on which those were
    rule: str = ""  # of spec.recovery.rules, by which it was decided
    confidence: float = 0.0
    reasons: tuple[str, ...] = ()
    summary: str = ""
    fingerprint: str = ""
    evidence_uri: str = ""  # of its dossier in the store; "" if none was sent there
    began_at: float
    detected_at: float
    gather_until: float | None = None  # evidence is awaited until then; None once the verdict stands
    tier: Tier | None = None
    restored_step: int | None = None
    origin: Origin | None = None  # where that step was had from; None: not known, or it began from scratch
    recovered_at: float | None = None  # first new step of all ranks
    steps_lost: int | None = None

    @property
    def is_open(self) -> bool:
        """The run is not yet back from it."""
        return self.recovered_at is None


class Strike(Fact, frozen=True, kw_only=True):
    """A recovery for which a machine is to blame. A node with enough of them is kept away from, by every run."""

    id: str  # of run and incident: what is told twice counts once
    node: str
    run: str  # "namespace/name"
    reason: str
    struck_at: float
    expires_at: float
    decisive: bool = False  # counts as many as are needed
    presumed: bool = False  # since it came again and again here, and nowhere else: lifted if it comes elsewhere too
    lifted: bool = False  # counts no more: nodes were short, or what was presumed was refuted


class NodeCheck(Fact, frozen=True, kw_only=True):
    """A check of machines that is due, or under way, before the attempt is launched."""

    why: str
    suspects: tuple[int, ...] = ()  # workers; () when nobody in particular
    asked: tuple[int, ...] = ()  # workers; () until all are there
    round: int = 1
    doubted: tuple[int, ...] = ()  # workers who looked bad in the round before
    until: float | None = None  # when the answers are awaited no longer


class Condition(Fact, frozen=True, kw_only=True):
    """As metav1.Condition; times are RFC 3339, set by the writer of the status."""

    type: str
    status: str  # "True", "False" or "Unknown"
    reason: str
    message: str = ""
    since: float = 0.0  # last transition


class CheckpointStatus(Fact, frozen=True, kw_only=True):
    """The newest committed checkpoint on the lineage."""

    step: int
    attempt: int
    uri: str
    committed_at: float
    verified: bool = False  # its digests were checked (by a restore or a verification)


class MemoryStatus(Fact, frozen=True, kw_only=True):
    """The newest save whose snapshots lie whole in the memory of workers, and what snapshots cost there."""

    step: int = -1  # -1: there is none
    attempt: int = 0
    seen_at: float | None = None  # when it was first seen to be whole
    workers: int = 0  # that hold some of it
    copied: bool | None = None  # it, or one before it, lies on two workers each; None: no worker has a buddy
    needed_bytes: int = 0  # of each worker, for its own snapshots and the copies that it keeps; 0: not known yet
    limit_bytes: int = 0  # of the pod; 0: none


class WorkerCounts(Fact, frozen=True, kw_only=True):
    """Workers wanted, connected, and taking part in the current attempt."""

    desired: int = 0
    ready: int = 0
    participating: int = 0
    spares: int = 0  # connected, and holding no place


class Ledger(Fact, frozen=True, kw_only=True):
    """Seconds of the run's life by what they were spent on; `productive` are steps that were kept."""

    pending: float = 0.0  # waiting for workers
    starting: float = 0.0  # from the first launch to the first step
    productive: float = 0.0
    lost: float = 0.0  # steps that had to be done again
    detecting: float = 0.0
    recovering: float = 0.0
    suspended: float = 0.0
    goodput: float = 0.0  # productive / all but suspended


class LimitInForce(Fact, frozen=True, kw_only=True):
    """How long a rank may go without a mark in this phase, and what that was learnt from."""

    phase: Phase
    limit_seconds: float  # then the gang counts as hung, and evidence is gathered
    patience_seconds: float  # then time alone is proof enough to kill for it
    samples: int = 0  # 0: it is the spec's
    median_seconds: float | None = None  # of the samples
    longest_seconds: float | None = None  # a step in medians of its time, or a gap between two marks of a phase


class Straggler(Fact, frozen=True, kw_only=True):
    """A rank that works clearly longer on each step than the others, who wait for it. It is reported, not killed."""

    rank: int
    worker: int
    factor: float  # its work on a step, in medians of the others'
    work_seconds: float  # per step
    began_at: float


class WishState(StrEnum):
    """What has become of a wish for a save."""

    OPEN = "open"
    ANSWERED = "answered"  # a checkpoint of its step, or of a later one, is committed
    GIVEN_UP = "given-up"  # the order was given again and again, and none was


class SaveWish(Fact, frozen=True, kw_only=True):
    """A save that was asked for, by a person or since the interval that mend chose is over."""

    id: str  # the value of the annotation that asked last; "" if none ever did
    step: int  # that the gang had completed then
    asked_at: float
    by_interval: bool = False
    state: WishState = WishState.OPEN
    attempt: int = 0  # in which the order was given last; 0: not yet
    told_at: float = 0.0
    times: int = 0


class IntervalInForce(Fact, frozen=True, kw_only=True):
    """How often the run saves, where that is left to mend, and what it was worked out from."""

    seconds: float
    launched_seconds: float | None = None  # what the ranks of this attempt were told to keep by themselves
    cost_seconds: float | None = None  # how long a save stops the loop; None: none was measured yet
    commit_seconds: float | None = None  # from the copy to the manifest
    failures: int = 0
    active_seconds: float = 0.0


class Evaluation(Fact, frozen=True, kw_only=True):
    """What an evaluation at a step has measured."""

    name: str
    attempt: int
    step: int
    value: float


class Score(Fact, frozen=True, kw_only=True):
    """What the checkpoint of this step and attempt is worth by evaluation."""

    name: str  # of the metric
    step: int
    attempt: int
    value: float


class RunStatus(Fact, frozen=True, kw_only=True):
    """Everything that the controller remembers of a run; a new leader continues from it."""

    phase: RunPhase = RunPhase.PENDING
    observed_generation: int = 0
    attempt: int = 0
    attempt_started_at: float | None = None
    follows: int | None = None  # until its launch: the attempt that this one carries on; `lineage` is still of that
    lineage: tuple[Ancestor, ...] = ()  # ancestors of the attempt, oldest first
    participants: tuple[int, ...] = ()  # workers of this attempt
    places: tuple[int, ...] = ()  # who held which place when last launched; () while everybody is in his own
    restore: tuple[CheckpointRef, ...] = ()  # what this attempt's ranks were told they may start from
    origins: tuple[Origin, ...] = ()  # where each of these lay
    keep: tuple[int, ...] = ()  # ranks of the attempt before whose processes go on in this one, if they can
    restored_step: int | None = None  # what the attempt started from (-1: fresh); None until a rank has said so
    origin: Origin | None = None  # where that step was had from
    roll_back_before: int | None = None  # restore only checkpoints below this step
    saving_until: float | None = None  # the ranks were asked to save and end, so that another gang can take over
    step: int = -1
    loss: float | None = None
    tokens: int = 0
    recoveries: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    reported_at: float = 0.0  # when step, loss and ledger were last written
    accounted_at: float | None = None  # up to when the ledger is
    checkpoint: CheckpointStatus | None = None
    wish: SaveWish | None = None  # the last one
    interval: IntervalInForce | None = None  # None unless spec.checkpoint.interval is auto
    evaluations: tuple[Evaluation, ...] = ()  # the newest, of the metric by which the best checkpoints are kept
    scores: tuple[Score, ...] = ()  # of the best checkpoints
    swept_at: float | None = None  # when leftovers were last looked for
    memory: MemoryStatus | None = None  # as of `reported_at`
    notices: tuple[str, ...] = ()  # that a worker will go, for which a save was asked for
    incidents: tuple[IncidentRecord, ...] = ()  # the newest MAX_INCIDENTS, oldest first
    spent: dict[FailureClass, tuple[float, ...]] = {}  # when each budget was drawn on, within its window
    replacing: tuple[str, ...] = ()  # uids of pods that are to go
    check: NodeCheck | None = None  # comes before the launch
    strikes: tuple[Strike, ...] = ()  # that this run has given, until they expire
    workers: WorkerCounts = WorkerCounts()
    ledger: Ledger = Ledger()
    limits: tuple[LimitInForce, ...] = ()  # as of `reported_at`
    stragglers: tuple[Straggler, ...] = ()
    conditions: tuple[Condition, ...] = ()
    accepted_spec: str = ""  # the last spec that could be run, as `noted` encodes it: goes on when a new one cannot

    @property
    def open_incident(self) -> IncidentRecord | None:
        """The incident that the run is not yet back from."""
        return self.incidents[-1] if self.incidents and self.incidents[-1].is_open else None

    def spent_within(self, failure: FailureClass, window_seconds: float, now: float) -> tuple[float, ...]:
        """When this budget was drawn on within so long before `now`."""
        return tuple(at for at in self.spent.get(failure, ()) if now - at < window_seconds)


MAX_INCIDENTS = 20
MAX_STRIKES = 20  # of one run, in its status


# ---------------------------------------------------------------- observation: what is
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


class StoredCheckpoint(Fact, frozen=True, kw_only=True):
    """A committed checkpoint as the store's listing and its manifest tell; snapshots in memory are told of alike."""

    ref: CheckpointRef
    run_uid: str = ""  # of the run that made it: the present one, or one that had the prefix before
    lineage: tuple[Ancestor, ...] = ()
    world_size: int = 0
    tokens: int = 0
    committed_at: float = 0.0
    bytes: int = 0
    quarantined: bool = False
    verified: bool = False
    pinned: bool = False  # retention leaves it alone


class StoredSave(Fact, frozen=True, kw_only=True):
    """A save's folder, committed or not, as a listing shows it; times are the store's own."""

    uri: str
    attempt: int
    modified_at: float  # of its newest object
    committed: bool = False
    quarantined_at: float | None = None
    pinned: bool = False


class StoreView(Fact, frozen=True, kw_only=True):
    """What is known of the run's prefix in the store. `listed` is false until the first listing has worked.

    `listed_for` and `listed_beside` say how fresh the listing is: the attempt that was the present one when it began,
    and the pods that were to be replaced and not yet gone then. What these committed later is not in it.
    """

    listed: bool = False
    listed_for: int = -1
    listed_beside: tuple[str, ...] = ()
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    partial: bool = False  # there may be older ones: they are still being listed
    problem: str = ""  # shown as a condition; "" when all is well
    problem_reason: str = "Ready"  # CamelCase: Unreachable, Forbidden, NoSuchBucket, PrefixOwned, BadCredentials
    caution: str = ""  # what the store does not do, although one can train on it
    passed_over: str = ""  # checkpoints that the signing key does not vouch for; "" if there are none, or no key
    evidence_problem: str = ""  # why the last dossier could not be kept; "" when it was


class StepTimes(Fact, frozen=True, kw_only=True, dict=True):  # a __dict__ for what is found out once
    """What is learnt about this attempt's steps: a bounded sample of their lengths in seconds, newest last."""

    seconds: tuple[float, ...] = ()
    peaks: tuple[float, float] = (
        1.0,
        1.0,
    )  # the two longest, in medians of their time; they fade over thousands of steps
    longest_gaps: dict[Phase, float] = {}  # seconds between two marks of any rank, by phase
    steps: int = 0  # heard of, as far as it matters: more than the sample where several fit between two heartbeats

    @property
    def median(self) -> float:
        """Of the sample; 0.0 without one."""
        return self.ordered[len(self.ordered) // 2] if self.seconds else 0.0

    @cached_property
    def ordered(self) -> tuple[float, ...]:
        """The sample, shortest first."""
        return tuple(sorted(self.seconds))


class Pace(Fact, frozen=True, kw_only=True):
    """Seconds that a rank worked on a step, without its waits for others, in each of its newest rounds, newest last."""

    rank: int
    worker: int
    seconds: tuple[float, ...]


class LossStanding(Fact, frozen=True, kw_only=True):
    """How the newest loss of this attempt lies against the points before it."""

    step: int
    loss: float
    median: float  # of the window before the first of those above
    bound: float  # beyond which a point is above
    deviations: float  # between loss and median, of the window's own
    above: int = 0  # newest points in a row
    above_since_step: int | None = None  # step of the first of them
    above_seconds: float = 0.0  # that their steps took


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


# ---------------------------------------------------------------- decision: what to do
class Action(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="action"):
    """Something to change in the world. Doing it twice is the same as doing it once."""


class CreateToken(Action, frozen=True, kw_only=True, tag="create-token"):
    """Make the run's Secret."""


class CreateTls(Action, frozen=True, kw_only=True, tag="create-tls"):
    """Make the Secret with the run's key and certificate."""


class CreateService(Action, frozen=True, kw_only=True, tag="create-service"):
    """Make the run's headless service."""


class CreateWorker(Action, frozen=True, kw_only=True, tag="create-worker"):
    """Make the pod of worker `index` for `attempt`, on none of the nodes to `avoid`."""

    index: int
    attempt: int
    avoid: tuple[str, ...] = ()


class DeleteWorker(Action, frozen=True, kw_only=True, tag="delete-worker"):
    """Delete this very pod (uid precondition). `grace_seconds` 0 forces it off a dead node."""

    name: str
    uid: str
    grace_seconds: int | None = None
    reason: str = ""


class SendLaunch(Action, frozen=True, kw_only=True, tag="send-launch"):
    """Tell the agent of `worker` (in this very pod) to start its ranks."""

    worker: int
    pod_uid: str
    launch: Launch


class SendGather(Action, frozen=True, kw_only=True, tag="send-gather"):
    """Ask the agent for evidence."""

    worker: int
    pod_uid: str
    attempt: int
    seconds: float


class SendSaveNow(Action, frozen=True, kw_only=True, tag="send-save-now"):
    """Tell the agent to have the gang save at the end of its step."""

    worker: int
    pod_uid: str
    attempt: int


class SendCheck(Action, frozen=True, kw_only=True, tag="send-check"):
    """Ask the agent to measure its machine."""

    worker: int
    pod_uid: str
    attempt: int
    round: int
    seconds: float
    neighbours: tuple[str, ...] = ()


class SendStop(Action, frozen=True, kw_only=True, tag="send-stop"):
    """Tell the agent to end its ranks up to `attempt`, and with `exit` itself."""

    worker: int
    pod_uid: str
    attempt: int
    reason: str
    grace_seconds: float = 0.0
    exit: bool = False
    exit_code: int = 0


class EmitEvent(Action, frozen=True, kw_only=True, tag="emit-event"):
    """Record a Kubernetes Event on the run."""

    type: str  # Normal or Warning
    reason: str
    message: str


class PruneCheckpoints(Action, frozen=True, kw_only=True, tag="prune-checkpoints"):
    """Delete these committed checkpoints (and nothing else)."""

    uris: tuple[str, ...]


class SweepLeftovers(Action, frozen=True, kw_only=True, tag="sweep-leftovers"):
    """Delete what attempts before this one have left uncommitted for long, and what was quarantined long ago."""

    attempt: int


class KeepEvidence(Action, frozen=True, kw_only=True, tag="keep-evidence"):
    """Write the dossier of this incident, composed from what it was judged on, beside the checkpoints."""

    key: str
    record: IncidentRecord


class StrikeNode(Action, frozen=True, kw_only=True, tag="strike-node"):
    """Enter the strike into the book that all runs share."""

    strike: Strike


class LiftStrikes(Action, frozen=True, kw_only=True, tag="lift-strikes"):
    """Let these strikes count no more."""

    ids: tuple[str, ...]


class DeleteRun(Action, frozen=True, kw_only=True, tag="delete-run"):
    """The run's time to live after its end is over."""


AnyAction = (
    CreateToken
    | CreateTls
    | CreateService
    | CreateWorker
    | DeleteWorker
    | SendLaunch
    | SendGather
    | SendSaveNow
    | SendCheck
    | SendStop
    | EmitEvent
    | PruneCheckpoints
    | SweepLeftovers
    | KeepEvidence
    | StrikeNode
    | LiftStrikes
    | DeleteRun
)


class Decision(Fact, frozen=True, kw_only=True):
    """What to do now: `status` is written first, then the actions done in order, then look again after `wake_after`."""

    status: RunStatus
    actions: tuple[AnyAction, ...] = ()
    reason: str = ""
    wake_after: float | None = None  # seconds; None: only when something changes
