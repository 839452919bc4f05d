"""What an agent tells without being asked: the progress of its ranks, its saves, and the loss curve."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from mend.protocol import Message
from mend.states import CheckpointRef, Held, Pending

LOSS: Final = "loss"  # the name of the points that are no evaluation's


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
    name: str = LOSS  # or the name of an evaluation metric, e.g. "lambada_acc"


class Points(Message, frozen=True, kw_only=True, tag_field="type", tag="points"):
    """New points of the curve of one attempt, oldest first."""

    attempt: int
    points: tuple[Point, ...]


StreamMessage = Heartbeat | Points

decode_stream = msgspec.json.Decoder(StreamMessage).decode
