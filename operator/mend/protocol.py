"""The wire contract: every name, message, exit code and key that controller, agent, rank and store share.

The controller dials the agent of each worker (port `AGENT_PORT`, bearer token from the run's Secret) and uses:

- `GET /v1/stream` answers newline-delimited JSON: `Heartbeat`s (whole snapshots, so that a lost line loses nothing)
  at every interval and at once when a fact changes, and `Points` of the loss curve.
- `POST /v1/orders` takes one `Order`, answers `Ack` (200), or `Evidence` for a `Gather`; 409 with an `Ack` for an
  order of an older attempt than the agent's own, 401 without the token.

Every message carries the attempt, the fencing token of a run: receivers drop what is older than what they know.
Times on the wire are ages in seconds, never wall-clock times, so that skewed clocks do no harm.
"""

from __future__ import annotations

import re
from enum import IntEnum, StrEnum
from typing import Final

import msgspec

# ---------------------------------------------------------------- Kubernetes names
GROUP: Final = "mend.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "TrainingRun"
PLURAL: Final = "trainingruns"
CONTROLLER_NAME: Final = "mend.dev/controller"

LABEL_RUN: Final = "mend.dev/run"
LABEL_WORKER: Final = "mend.dev/worker"
LABEL_ATTEMPT: Final = "mend.dev/attempt"
ANNOTATION_SAVE_NOW: Final = "mend.dev/save-now"  # of a run: each new value is a wish for a save
ANNOTATION_AVOIDS: Final = "mend.dev/avoids"  # of a pod: the nodes that mend keeps it off, with commas between
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"

TRAINER_CONTAINER: Final = "trainer"
AGENT_PORT: Final = 7117
AGENT_PORT_NAME: Final = "mend-agent"
AGENT_COMMAND: Final = "mend-agent"
TOKEN_SECRET_KEY: Final = "token"
AUTHORITY_SECRET_KEY: Final = "ca.crt"  # in the Secret with the store's credentials; may be absent
TLS_SECRET_KEY: Final = "tls.pem"
SIGNING_SECRET_KEY: Final = "signing.key"

STREAM_PATH: Final = "/v1/stream"
ORDERS_PATH: Final = "/v1/orders"
BULK_PATH: Final = "/v1/bulk"  # zeros, for another agent of the run to measure the way
BULK_BYTES: Final = 32 << 20

# ---------------------------------------------------------------- environment
# Given to the agent by the pod that `render` makes.
ENV_RUN: Final = "MEND_RUN"  # "namespace/name"
ENV_RUN_UID: Final = "MEND_RUN_UID"
ENV_WORKER: Final = "MEND_WORKER"  # this worker's stable index, 0-based
ENV_WORKERS: Final = "MEND_WORKERS"
ENV_RANKS_PER_WORKER: Final = "MEND_RANKS_PER_WORKER"
ENV_TOKEN: Final = "MEND_TOKEN"
ENV_POD_IP: Final = "MEND_POD_IP"
ENV_POD_UID: Final = "MEND_POD_UID"
ENV_AGENT_PORT: Final = "MEND_AGENT_PORT"
ENV_HEARTBEAT_SECONDS: Final = "MEND_HEARTBEAT_SECONDS"
ENV_GRACE_SECONDS: Final = "MEND_GRACE_SECONDS"
ENV_TLS_PEM: Final = "MEND_TLS_PEM"  # key and certificate of the run, by which workers know each other
ENV_SIGNING_KEY: Final = "MEND_SIGNING_KEY"  # of manifests; absent: they are not signed
ENV_STORE_AUTHORITY: Final = "MEND_STORE_AUTHORITY"  # PEM certificates to check the store's against
ENV_STORE_REQUESTS: Final = "MEND_STORE_REQUESTS_PER_SECOND"  # by one process; absent: without limit
ENV_PRELOAD: Final = "MEND_PRELOAD"  # comma-separated modules a standby imports beside torch
# Given to a rank by its agent, beside torchrun's RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK,
# MASTER_ADDR, MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE, TORCHELASTIC_RESTART_COUNT, TORCH_WORKER_SERVER_SOCKET.
ENV_ATTEMPT: Final = "MEND_ATTEMPT"
ENV_LAUNCH: Final = "MEND_LAUNCH"  # the `Launch` order as JSON
ENV_PAGE: Final = "MEND_PAGE"  # path of the rank's progress page
ENV_REPORT_FD: Final = "MEND_REPORT_FD"  # pipe for `Report` lines
ENV_STACKS: Final = "MEND_STACKS"  # path that faulthandler writes to on SIGUSR1
ENV_ORDERS_FD: Final = "MEND_ORDERS_FD"  # pipe of `Rejoin` lines from the agent
ENV_FOOTING: Final = "MEND_FOOTING"  # path of what the rank keeps of the steps it completed last
ENV_ARENA: Final = "MEND_ARENA"  # path of the rank's shared memory for snapshots
ENV_SNAPSHOT_TOKEN: Final = "MEND_SNAPSHOT_TOKEN"  # made of the run's token; opens snapshots and gives no orders
ENV_ARENAS: Final = "MEND_ARENAS"  # paths of all arenas of this worker, by commas: where to look when restoring


class ExitCode(IntEnum):
    """What an agent (and so its pod), or a rank that uses the session, exits with."""

    SUCCEEDED = 0
    USER_ERROR = 1  # the training code raised; the traceback is in the report
    MISFIT = 65  # fatal: the checkpoint or configuration does not fit the model; trying again cannot help
    AGENT_FAILED = 70  # the agent itself broke
    UNSAVED = 73  # the last step was trained, but the store would not take it
    STORAGE = 74  # no checkpoint could be read although the run has some
    STOPPED = 75  # told to stop by the controller; the run goes on elsewhere or later
    BAD_CONFIG = 78  # fatal: the agent's environment or the command is unusable
    CANNOT_EXECUTE = 126  # fatal: the command is not executable
    NOT_FOUND = 127  # fatal: the command does not exist
    TERMINATED = 143  # SIGTERM (the pod is going); state was saved if time allowed


STORE_EXIT_CODES: Final = frozenset({ExitCode.UNSAVED, ExitCode.STORAGE})  # no rank's fault, on whatever machine
FATAL_EXIT_CODES: Final = frozenset({ExitCode.MISFIT, ExitCode.BAD_CONFIG, ExitCode.CANNOT_EXECUTE, ExitCode.NOT_FOUND})


class Phase(StrEnum):
    """What a rank is doing. The order is the code on the progress page: append, never reorder."""

    STARTING = "starting"
    LOADING = "loading"
    DATA = "data"
    STEP = "step"
    COLLECTIVE = "collective"
    SAVING = "saving"
    EVALUATING = "evaluating"
    EXITING = "exiting"


class AgentState(StrEnum):
    """What an agent is doing with the attempt it names."""

    IDLE = "idle"  # no ranks, waiting for a launch
    RUNNING = "running"  # ranks were launched; some may have exited
    STOPPING = "stopping"  # ranks are being ended
    FINISHED = "finished"  # every rank exited with 0


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything on the wire: immutable, keyword-only, defaults left out."""


# ---------------------------------------------------------------- agent -> controller
class RankError(Message, frozen=True, kw_only=True):
    """An exception that ended, or is ending, a rank: written by the rank itself when it raises."""

    type: str
    message: str
    traceback: str = ""  # the last 8 KiB
    fatal: bool = False  # trying again cannot help (for example a checkpoint of another model)
    age_seconds: float = 0.0


class RankExit(Message, frozen=True, kw_only=True):
    """How a rank's process ended: exactly one of `code` and `signal` is set."""

    code: int | None = None
    signal: int | None = None
    oom_killed: bool = False
    age_seconds: float = 0.0
    log_tail: tuple[str, ...] = ()  # the last lines it printed


class RankReport(Message, frozen=True, kw_only=True):
    """One rank as its agent sees it now."""

    rank: int
    pid: int
    phase: Phase = Phase.STARTING
    phase_seconds: float = 0.0  # since the phase began
    progress_seconds: float = 0.0  # since the last mark of any kind (age of progress)
    step: int = -1  # last completed step; -1 before the first
    step_seconds: float = 0.0  # length of that step
    steps_done: int = 0  # steps completed by this process, in this attempt
    stepped_seconds: float = 0.0  # length of all these steps
    waited_seconds: float = 0.0  # of that for its peers; 0: not measured
    loss: float | None = None
    nonfinite: bool = False  # the last loss was NaN or infinite
    tokens: int = 0  # tokens that the whole run has consumed up to `step`
    longest_gaps: dict[Phase, float] = {}  # seconds between two marks in each phase that this process was in
    can_rejoin: bool = False  # its process can go on in the next attempt
    exit: RankExit | None = None
    error: RankError | None = None


class Ancestor(Message, frozen=True, kw_only=True):
    """One link of a lineage: a checkpoint of `attempt` at `step` was restored by the attempt that came next.

    Runs that had the prefix one after the other may have used the same numbers: its uid tells their attempts apart.
    """

    attempt: int
    step: int
    uid: str = ""  # of the run; "" in what was written before links had one: any


class CheckpointRef(Message, frozen=True, kw_only=True):
    """A state by name: where the checkpoint is and which attempt made it at which step.

    Without a uri it is no checkpoint: a fresh start (step -1), or the state that ranks which rejoined had in memory.
    `memory:SAVE-ID` names snapshots in the shared memory of workers.
    """

    uri: str
    step: int
    attempt: int

    @property
    def is_of_peers(self) -> bool:
        """Whether it was handed on from memory to memory."""
        return not self.uri and self.step >= 0

    @property
    def save_in_memory(self) -> str:
        """The save whose snapshots in shared memory are meant; "" for anything else."""
        return self.uri.removeprefix(MEMORY_SCHEME) if self.uri.startswith(MEMORY_SCHEME) else ""


class Held(Message, frozen=True, kw_only=True):
    """Snapshots of one save that lie whole in one worker's memory, its own ranks' and copies of its buddy's."""

    save_id: str
    run_uid: str
    attempt: int
    step: int
    tokens: int
    world_size: int
    ranks: tuple[int, ...]  # whose snapshots, by the numbers of the world that saved
    lineage: tuple[Ancestor, ...] = ()


class Pending(Message, frozen=True, kw_only=True):
    """The newest snapshots of one worker's ranks, which all have published; their digests are still being taken."""

    attempt: int
    step: int
    world_size: int
    ranks: tuple[int, ...]  # all of this worker
    step_seconds: float  # how long that step took, and would take once more


class Holder(Message, frozen=True, kw_only=True):
    """Where one rank's snapshot of a save lies."""

    save_id: str
    rank: int  # of the world that saved
    worker: int
    url: str  # https://HOST:PORT of that worker's saver; needless where the worker is the asker's own


class SaveReport(Message, frozen=True, kw_only=True):
    """Health of saving in this attempt, as rank 0 reports it."""

    committed: CheckpointRef | None = None
    committed_age_seconds: float = 0.0
    stall_seconds: float = 0.0  # how long the last save stopped the loop
    commit_seconds: float = 0.0  # from the copy to the manifest
    bytes: int = 0
    failures: int = 0  # saves that failed since the last that worked
    error: str = ""  # why the last one failed
    skipped: int = 0  # saves that were due while the one before was still being written
    begun_step: int = -1  # of the last save that was begun, whatever came of it; -1: none, or an older agent


class MemoryReport(Message, frozen=True, kw_only=True):
    """What snapshots cost a worker in memory."""

    needed_bytes: int  # for two snapshots of each rank, and two copies of the buddy's
    limit_bytes: int = 0  # of the pod; 0: none


class Heartbeat(Message, frozen=True, kw_only=True, tag_field="type", tag="heartbeat"):
    """A whole snapshot of one worker. `restored` is what its ranks really started from."""

    attempt: int  # 0 before the first launch
    worker: int
    agent_id: str  # changes when the agent restarts
    state: AgentState
    sequence: int
    ranks: tuple[RankReport, ...] = ()
    standbys_ready: int = 0
    store_port: int = 0  # of the keeper of this agent's TCPStores, one per attempt; 0: not up yet
    restored: CheckpointRef | None = None
    quarantined: tuple[str, ...] = ()  # URIs that failed verification in this attempt
    save: SaveReport | None = None
    held: tuple[Held, ...] = ()
    pending: Pending | None = None  # newer than what is held; None also from an agent that is older than this field
    saver_port: int = 0  # where savers serve snapshots over TLS, as long as this agent lives; 0: none ever will
    memory: MemoryReport | None = None
    store_requests: int = 0  # to the store, by this worker's saver since it began
    stored_bytes: int = 0  # sent to the store, likewise
    terminating: bool = False  # SIGTERM was received


class Point(Message, frozen=True, kw_only=True, array_like=True):
    """One step of the loss curve, as rank 0 reported it."""

    step: int
    loss: float | None
    tokens: int
    seconds: float  # length of the step
    name: str = "loss"  # or the name of an evaluation metric, e.g. "lambada_acc"


class Points(Message, frozen=True, kw_only=True, tag_field="type", tag="points"):
    """New points of the curve of one attempt, oldest first."""

    attempt: int
    points: tuple[Point, ...]


StreamMessage = Heartbeat | Points


class GroupProgress(Message, frozen=True, kw_only=True):
    """A process group's collective counters in one rank (torch's flight recorder, `pg_status`)."""

    name: str
    ranks: tuple[int, ...] = ()  # global ranks of the group when known
    last_enqueued: int = -1
    last_started: int = -1
    last_completed: int = -1
    last_enqueued_name: str = ""  # profiling name, e.g. "gloo:all_reduce"
    recent_names: tuple[str, ...] = ()  # of the newest collectives entered, newest last


class RankEvidence(Message, frozen=True, kw_only=True):
    """What was found about one rank before anything was killed. Empty fields mean that the source did not answer."""

    rank: int
    process_state: str = ""  # /proc: R running, S sleeping, D disk, T stopped, Z zombie, X gone
    threads: int = 0
    threads_running: int = 0
    kernel_function: str = ""  # where its main thread sleeps in the kernel, where that may be read
    cpu_share: float = 0.0  # of one CPU, that its main thread used between two looks
    memory_growth: float = 0.0  # bytes that it took up in a second, between two looks
    python_answers: bool | None = None  # whether Python code ran when asked; False: the GIL is held. None: not asked
    groups: tuple[GroupProgress, ...] = ()
    recorder_answered: bool = False
    stack: str = ""  # faulthandler's dump, main thread last
    log_tail: tuple[str, ...] = ()
    phase: Phase = Phase.STARTING
    progress_seconds: float = 0.0
    step: int = -1


class Evidence(Message, frozen=True, kw_only=True, tag_field="type", tag="evidence"):
    """Everything gathered on one worker in answer to a `Gather`."""

    attempt: int
    worker: int
    ranks: tuple[RankEvidence, ...]
    gather_seconds: float = 0.0
    memory_used: int = 0  # bytes that the worker cannot do without
    memory_limit: int = 0  # at which its kernel kills; 0: not known


WAY_FIGURE: Final = "way to a neighbour"  # among the figures of a check: the better of two


class Checked(Message, frozen=True, kw_only=True, tag_field="type", tag="checked"):
    """What a machine can do, in answer to a `Check`: to be compared with its peers, never with fixed figures."""

    attempt: int
    worker: int
    round: int = 1
    figures: dict[str, float] = {}  # by what was measured ("cuda:0 matrix product"): so much a second
    problem: str = ""  # the check died, did not end in time, or gave wrong numbers
    seconds: float = 0.0


# ---------------------------------------------------------------- controller -> agent
class CheckpointPlan(Message, frozen=True, kw_only=True):
    """How an attempt saves. Credentials are not here: they reach the rank as environment of the pod."""

    uri: str  # prefix of the run: s3://bucket/prefix or file:///path
    endpoint: str | None = None
    interval_steps: int | None = None
    interval_seconds: float | None = None
    keep_last: int = 3
    keep_every: int | None = None
    memory_interval_steps: int | None = None  # snapshots beside those that are saved: every so many steps
    peer_bytes_per_second: int = 0  # how fast snapshots are copied to the buddy at most; 0: as fast as it goes
    verify: bool = False  # read each checkpoint back, once it is committed


class Launch(Message, frozen=True, kw_only=True, tag_field="type", tag="launch"):
    """Start the ranks of `attempt`; ranks of older attempts are killed first. Repeating it changes nothing.

    The processes of the ranks in `keep` are not killed but told to go on in this attempt, if they are of the attempt
    `follows` and can; the others are replaced, as one is that does not come within a few seconds.
    """

    attempt: int
    world_size: int
    first_rank: int
    ranks: int
    workers: int
    master_addr: str
    master_port: int
    run: str = ""  # "namespace/name"
    run_uid: str = ""
    restore: tuple[CheckpointRef, ...] = ()  # candidates, best first; empty: a fresh start
    checkpoint: CheckpointPlan | None = None
    holders: tuple[Holder, ...] = ()  # of the candidates that lie in memory
    buddy: str = ""  # https://HOST:PORT of the saver to which this worker's snapshots are copied; "": none
    keep: tuple[int, ...] = ()
    follows: int = 0  # the attempt of the ranks to keep: what is left of older ones may be off the lineage
    env: dict[str, str] = {}


class Gather(Message, frozen=True, kw_only=True, tag_field="type", tag="gather"):
    """Collect evidence about the ranks of `attempt` within `seconds`; kills nothing."""

    attempt: int
    seconds: float = 2.0


class Stop(Message, frozen=True, kw_only=True, tag_field="type", tag="stop"):
    """End all ranks up to and including `attempt`. With `exit`, the agent then exits too, with `exit_code`."""

    attempt: int
    reason: str = ""
    grace_seconds: float = 0.0  # 0: SIGKILL at once; else SIGTERM first and save if time allows
    exit: bool = False
    exit_code: int = ExitCode.STOPPED


class SaveNow(Message, frozen=True, kw_only=True, tag_field="type", tag="save-now"):
    """Save at the end of the current step."""

    attempt: int


class Check(Message, frozen=True, kw_only=True, tag_field="type", tag="check"):
    """Measure the machine, within `seconds`, while no ranks run here; `attempt` is the one that waits for it."""

    attempt: int
    round: int = 1  # what looks bad is measured again
    seconds: float = 20.0
    neighbours: tuple[str, ...] = ()  # http://HOST:PORT of agents to which the way is measured


Order = Launch | Gather | Stop | SaveNow | Check


class Ack(Message, frozen=True, kw_only=True):
    """An agent's answer to an order: whether it took it, at which attempt it is, and why not."""

    accepted: bool
    attempt: int
    reason: str = ""


# ---------------------------------------------------------------- rank -> agent (lines on the report pipe)
class Committed(Message, frozen=True, kw_only=True, tag_field="type", tag="committed"):
    """Rank 0 committed a checkpoint."""

    checkpoint: CheckpointRef
    stall_seconds: float
    commit_seconds: float
    bytes: int


class SaveFailed(Message, frozen=True, kw_only=True, tag_field="type", tag="save-failed"):
    """A save failed; training goes on."""

    step: int
    error: str


class Restored(Message, frozen=True, kw_only=True, tag_field="type", tag="restored"):
    """Rank 0 starts from this."""

    checkpoint: CheckpointRef


class Quarantined(Message, frozen=True, kw_only=True, tag_field="type", tag="quarantined"):
    """A checkpoint failed verification and was marked so in the store."""

    uri: str
    reason: str


class Raised(Message, frozen=True, kw_only=True, tag_field="type", tag="raised"):
    """The rank is ending with this exception."""

    error: RankError


class Measured(Message, frozen=True, kw_only=True, tag_field="type", tag="measured"):
    """A point of the loss curve or of an evaluation."""

    point: Point


class Rejoined(Message, frozen=True, kw_only=True, tag_field="type", tag="rejoined"):
    """The rank has left the attempt before and goes on in this one: what it reports from now on belongs to it."""

    attempt: int


class Stepped(Message, frozen=True, kw_only=True, tag_field="type", tag="stepped"):
    """The rank has completed its first step of this attempt: a recovery is over by it, so it is told at once."""


class Staged(Message, frozen=True, kw_only=True, tag_field="type", tag="staged"):
    """This rank has published a snapshot in its arena."""

    save_id: str
    step: int
    owed: bool  # it is to be saved; else it only stays in memory


class Skipped(Message, frozen=True, kw_only=True, tag_field="type", tag="skipped"):
    """A save was due and could not begin: the ones before are still being written."""

    step: int


Report = Staged | Skipped | Committed | SaveFailed | Restored | Quarantined | Raised | Measured | Rejoined | Stepped


# ---------------------------------------------------------------- agent -> rank (lines on the pipe of orders)
class Rejoin(Message, frozen=True, kw_only=True):
    """Break off, keep model and process, and go on in the attempt that `env` describes as it would to a new rank."""

    attempt: int
    env: dict[str, str]


# ---------------------------------------------------------------- keys in the store, below the run's prefix
OWNER_KEY: Final = "owner.json"
MANIFEST_NAME: Final = "manifest.json"
QUARANTINE_NAME: Final = "quarantine.json"
VERIFIED_NAME: Final = "verified.json"  # all that lies in the save's folder was read back and is right
PINNED_NAME: Final = "pinned.json"  # retention leaves the save alone
INCIDENTS_FOLDER: Final = "incidents"
ANNOUNCEMENTS_FOLDER: Final = "newest"
TOKENIZERS_FOLDER: Final = "tokenizers"  # their files, for exports, by the digests of their bytes
MEMORY_SCHEME: Final = "memory:"  # of a CheckpointRef: no place in the store
DCP_METADATA_NAME: Final = ".metadata"  # a pickle for other tools; never read by mend


SAVE_FOLDER: Final = r"step-(?P<step>\d{12})/(?P<attempt>\d{6,12})-(?P<save_id>[^/]+)"  # of every save, as a pattern
_LAST: Final = 10**12 - 1  # attempt and step that an announcement can tell
_ANNOUNCEMENT: Final = re.compile(rf"{ANNOUNCEMENTS_FOLDER}/(\d{{12}})-(\d{{12}})-([^/]+)")


def agent_url(ip: str, port: int = AGENT_PORT) -> str:
    """Where an agent is reached, without a path."""
    return f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}"


def saver_url(ip: str, port: int) -> str:
    """Where a saver is reached, without a path."""
    return f"https://[{ip}]:{port}" if ":" in ip else f"https://{ip}:{port}"


def checkpoint_key(step: int, attempt: int, save_id: str) -> str:
    """Key prefix of one save, relative to the run's prefix. Sorts by step; never reused."""
    return f"step-{step:012d}/{attempt:06d}-{save_id}"


def announcement_key(folder: str) -> str:
    """Key that announces the save in `folder` (a `checkpoint_key`): the newest attempt's newest step sorts first.

    Written before the manifest. Within a lineage a later attempt is further than the one before was when it was left.
    """
    found = re.fullmatch(SAVE_FOLDER, folder)
    if found is None:
        raise ValueError(f"{folder!r} is no folder of a save: expected step-STEP/ATTEMPT-SAVE")
    step, attempt, save_id = found.groups()
    return f"{ANNOUNCEMENTS_FOLDER}/{_LAST - int(attempt):012d}-{_LAST - int(step):012d}-{save_id}"


def announced_folder(key: str) -> str:
    """The folder of the save that `key` announces; "" for a key that announces none."""
    found = _ANNOUNCEMENT.fullmatch(key)
    return checkpoint_key(_LAST - int(found[2]), _LAST - int(found[1]), found[3]) if found else ""


def share_name(rank: int) -> str:
    """Of the object, in a save's folder, that tells what one rank's snapshot has become there."""
    return f"share-{rank:06d}.json"


def incident_key(attempt: int, incident: int, run_uid: str) -> str:
    """Key of an incident's dossier, relative to the run's prefix: no listing of checkpoints finds it.

    The uid keeps apart the runs that have the prefix one after the other, each of which counts from one.
    """
    return f"{INCIDENTS_FOLDER}/{attempt:06d}-{incident:06d}-{run_uid[:8]}.json"


def encode(message: Message) -> bytes:
    """One message as compact JSON, without a newline."""
    return msgspec.json.encode(message)


decode_stream = msgspec.json.Decoder(StreamMessage).decode
decode_order = msgspec.json.Decoder(Order).decode
decode_report = msgspec.json.Decoder(Report).decode
decode_checked = msgspec.json.Decoder(Checked).decode
decode_evidence = msgspec.json.Decoder(Evidence).decode
decode_ack = msgspec.json.Decoder(Ack).decode
decode_launch = msgspec.json.Decoder(Launch).decode
decode_rejoin = msgspec.json.Decoder(Rejoin).decode
