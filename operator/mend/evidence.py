"""What an agent gathers about its ranks, when it is asked and before anything is killed."""

from __future__ import annotations

import msgspec

from mend.heartbeats import Phase
from mend.protocol import Message


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


decode_evidence = msgspec.json.Decoder(Evidence).decode
