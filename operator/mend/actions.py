"""What can be decided: the status to write, and the actions that change something in the world."""

from __future__ import annotations

import msgspec

from mend.facts import Fact
from mend.incidents import IncidentRecord, Strike
from mend.orders import Launch
from mend.status import RunStatus


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
