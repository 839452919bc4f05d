"""What can go wrong with a run: who did it, what it is paid from, how to recover, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import takewhile

from mend.facts import Fact


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


def open_in_a_row(incidents: Sequence[IncidentRecord]) -> int:
    """How many of the latest incidents the run is not yet back from: all but the first broke a recovery."""
    return len(list(takewhile(lambda each: each.is_open, reversed(incidents))))


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
