"""What the controller remembers of a run, in the status of its CR."""

from __future__ import annotations

from enum import StrEnum

from mend.facts import Fact
from mend.heartbeats import Phase
from mend.incidents import FailureClass, IncidentRecord, Origin, Strike
from mend.states import Ancestor, CheckpointRef

MAX_INCIDENTS = 20
MAX_STRIKES = 20  # of one run, in its status


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
    def attempt_of_line(self) -> int:
        """The attempt whose line `lineage` is: until its launch, an attempt stands on that of the one it follows."""
        return self.attempt if self.follows is None else self.follows

    @property
    def open_incident(self) -> IncidentRecord | None:
        """The incident that the run is not yet back from."""
        return self.incidents[-1] if self.incidents and self.incidents[-1].is_open else None

    def spent_within(self, failure: FailureClass, window_seconds: float, now: float) -> tuple[float, ...]:
        """When this budget was drawn on within so long before `now`."""
        return tuple(at for at in self.spent.get(failure, ()) if now - at < window_seconds)
