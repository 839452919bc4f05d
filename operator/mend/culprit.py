"""Pure: who did it. From the ranks' exits, or from evidence gathered before anything was killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from mend.model import Verdict
from mend.protocol import SAVE_GROUP, STORE_EXIT_CODES, ExitCode, GroupProgress, Phase, RankEvidence, RankReport

STOPPED = frozenset("Tt")
UNINTERRUPTIBLE = frozenset("D")
DEAD = frozenset("ZXx")

# What a healthy rank raises or prints when a peer dies: the symptom, never the cause.
SYMPTOM_TYPES = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "BrokenPipeError"})
SYMPTOM_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "nccl error",
    "ncclremoteerror",
    "socket timeout",
    "failed to connect",
    "gloo connectfullmesh failed",
)
POINT_TO_POINT = (":send", ":recv")
COLLECTIVE_FRAMES = ("all_reduce", "allreduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "_wait")

UNKNOWN = Verdict(reasons=("the evidence does not say who",))


def is_symptom(rank: RankReport) -> bool:
    """Whether this rank's end is what a peer's death does to a healthy rank."""
    error = rank.error
    if rank.exit is not None and rank.exit.code == ExitCode.AGENT_FAILED:
        return True  # its agent found no store to meet the others at
    if error is None:
        return False
    text = error.message.lower()
    return error.type in SYMPTOM_TYPES or (
        error.type in {"RuntimeError", "ConnectionError", "ConnectionResetError", "TimeoutError"}
        and any(words in text for words in SYMPTOM_WORDS)
    )


def of_crash(ended: Sequence[RankReport]) -> Verdict:
    """The culprit among ranks that have ended or raised: those whose end is no symptom; all, if all raised alike."""
    causes = [rank for rank in ended if not is_symptom(rank)]
    if causes and all(rank.exit is not None and rank.exit.code in STORE_EXIT_CODES for rank in causes):
        unsaved = any(rank.exit is not None and rank.exit.code == ExitCode.UNSAVED for rank in causes)
        what = "the last step cannot be saved" if unsaved else "no checkpoint can be read"
        return Verdict(reasons=(f"{what}, which is no rank's fault",))
    if not causes:
        return Verdict(reasons=("every rank that ended was only cut off by a peer",))
    killed = [rank for rank in causes if rank.exit and rank.exit.signal]
    raised = [rank for rank in causes if rank.error]
    one_drew_the_other = bool(killed and raised)
    guilty = [max(causes, key=ended_age)] if one_drew_the_other else killed or raised or causes
    names = tuple(rank.rank for rank in guilty)
    reasons = tuple(f"rank {rank.rank} {how_it_ended(rank)}" for rank in guilty[:8])
    innocent = len(ended) - len(causes)
    if innocent:
        reasons += (f"{innocent} more ended only because a peer was gone",)
    return Verdict(ranks=names, confidence=0.95 if len(guilty) == 1 else 0.8, reasons=reasons)


def how_it_ended(rank: RankReport) -> str:
    """A rank's end in words: 'was killed by SIGKILL', 'raised ValueError: ...'."""
    if rank.error is not None:
        first_line = rank.error.message.strip().splitlines()[0] if rank.error.message.strip() else ""
        return f"raised {rank.error.type[:100]}" + (f": {first_line[:200]}" if first_line else "")
    if rank.exit is None:
        return "is alive"
    if rank.exit.oom_killed:
        return "was killed for using too much memory (OOM)"
    if rank.exit.signal is not None:
        return f"was killed by {signal_name(rank.exit.signal)}"
    if rank.exit.code == ExitCode.UNSAVED:
        return "could not save its last step: the store takes nothing"
    if rank.exit.code == ExitCode.STORAGE:
        return "could read none of its checkpoints"
    return f"exited with code {rank.exit.code}"


def ended_age(rank: RankReport) -> float:
    """Seconds since the rank raised or exited, whichever came first."""
    return max((part.age_seconds for part in (rank.exit, rank.error) if part is not None), default=0.0)


def signal_name(number: int) -> str:
    """'SIGKILL' for 9; 'signal 99' for what has no common name."""
    names = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE"}
    names |= {9: "SIGKILL", 11: "SIGSEGV", 13: "SIGPIPE", 15: "SIGTERM"}
    return names.get(number, f"signal {number}")


def of_hang(evidence: Sequence[RankEvidence], world_size: int) -> Verdict:
    """The culprit of a hang: the rank that is stopped, or that the others wait for; else unknown.

    The order is that of certainty: the kernel's word on the process, then who waits for whom in collectives, then
    another collective than the rest, then the phase, then the stack. All but the first compare ranks with each other,
    so they need all of them: among those that happened to answer, the odd one out may be the healthy one.
    """
    if verdict := _by_process_state(evidence):
        return verdict
    evidence = [_without_saving(rank) for rank in evidence]
    if len(evidence) < world_size:
        return Verdict(reasons=(f"only {len(evidence)} of {world_size} ranks could be asked, and these cannot say",))
    for witness in (_by_waiting, _by_mismatch, _by_recorder, _by_phase, _by_stack):
        if verdict := witness(evidence):
            return verdict
    if len(evidence) > 1 and all(map(_is_waiting, evidence)):
        return Verdict(reasons=("all ranks wait equally in the same collective: network or switch, no rank is blamed",))
    return UNKNOWN


def _without_saving(rank: RankEvidence) -> RankEvidence:
    """Saves go on behind the training and wait for the store: who is awaited there is not to blame for a hang."""
    return replace(rank, groups=tuple(group for group in rank.groups if SAVE_GROUP not in group.name))


def _by_process_state(evidence: Sequence[RankEvidence]) -> Verdict | None:
    for states, words, confidence in (
        (STOPPED, "is stopped (state T)", 0.98),
        (DEAD, "is dead (state Z)", 0.95),
        (UNINTERRUPTIBLE, "hangs in the kernel (state D: disk, driver or network file system)", 0.9),
    ):
        found = [rank for rank in evidence if rank.process_state in states]
        shared = states is UNINTERRUPTIBLE and len(found) == len(evidence)  # their file system, not they
        if found and not shared:
            return _named(found, confidence, [f"rank {rank.rank} {words}" for rank in found])
    return None


def _by_waiting(evidence: Sequence[RankEvidence]) -> Verdict | None:
    """Who is waited for and waits for nobody: a rank that lags in one group may itself be stuck in another."""
    waits = {rank.rank: _waited_for(rank, evidence) for rank in evidence}
    awaited = {other for others in waits.values() for other in others}
    guilty = [rank for rank in evidence if rank.rank in awaited and not waits[rank.rank]]
    # One that ran ahead makes all others look late: a majority that waits for nobody is not blamed.
    if not guilty or 2 * len(guilty) > len(evidence):
        return None
    waiting = sum(1 for others in waits.values() if others & {rank.rank for rank in guilty})
    reasons = [_why_awaited(rank, evidence, waiting) for rank in guilty]
    return _named(guilty, 0.95 if len(guilty) == 1 else 0.8, reasons)


def _waited_for(rank: RankEvidence, evidence: Sequence[RankEvidence]) -> set[int]:
    """The ranks that have not yet entered a collective in which this one is."""
    found: set[int] = set()
    for group in rank.groups:
        if not _is_in(group) or _is_point_to_point(group):
            continue  # sends and receives are counted by their two ends only: such counts cannot be compared
        for other in evidence:
            entered = _entered(other, group)
            if other.rank != rank.rank and entered is not None and entered < group.last_enqueued:
                found.add(other.rank)
    return found


def _entered(rank: RankEvidence, group: GroupProgress) -> int | None:
    """The last collective of `group` that the rank entered: -1 for none; None if it is no member or does not say."""
    if not rank.recorder_answered:
        return None
    same = _group(rank, group.name)
    if same is not None:
        return same.last_enqueued
    return -1 if rank.rank in group.ranks else None


def _why_awaited(rank: RankEvidence, evidence: Sequence[RankEvidence], waiting: int) -> str:
    for name in _group_names(evidence):
        groups = [group for each in evidence if (group := _group(each, name)) is not None]
        front = max(groups, key=lambda group: group.last_enqueued)
        entered = _entered(rank, front)
        if entered is not None and entered < front.last_enqueued:
            which = f"collective {front.last_enqueued} of group {name}"
            have = f"it has entered only {entered}" if entered >= 0 else "it has entered none there"
            return f"rank {rank.rank}: {waiting} others wait in {which}, {have}{_seen_at(rank)}"
    return f"rank {rank.rank}: {waiting} others wait for it"


def _by_mismatch(evidence: Sequence[RankEvidence]) -> Verdict | None:
    for name in _group_names(evidence):
        entered = {rank.rank: group for rank in evidence if (group := _group(rank, name)) is not None}
        same_count = len({group.last_enqueued for group in entered.values()}) == 1
        stuck = same_count and any(map(_is_in, entered.values()))
        called = Counter(group.last_enqueued_name for group in entered.values() if group.last_enqueued_name)
        if not stuck or len(called) < 2 or any(map(_is_point_to_point, entered.values())):
            continue
        (usual, votes), *_ = called.most_common()
        odd = [
            rank
            for rank in evidence
            if rank.rank in entered and entered[rank.rank].last_enqueued_name not in ("", usual)
        ]
        if votes <= len(odd):
            return Verdict(reasons=(f"the ranks entered different collectives, {' or '.join(sorted(called))}",))
        reasons = [
            f"rank {rank.rank} entered {entered[rank.rank].last_enqueued_name} where the others entered {usual}"
            for rank in odd
        ]
        return _named(odd, 0.85, reasons)
    return None


def _by_recorder(evidence: Sequence[RankEvidence]) -> Verdict | None:
    """A rank whose C++ worker server does not answer, although it needs no Python, while the others' do."""
    mute = [rank for rank in evidence if not rank.recorder_answered]
    others = [rank for rank in evidence if rank.recorder_answered]
    if not mute or len(mute) >= len(others) or not all(map(_is_waiting, others)):
        return None
    return _named(mute, 0.7, [f"rank {rank.rank} does not answer while the others wait" for rank in mute])


def _is_waiting(rank: RankEvidence) -> bool:
    return any(map(_is_in, rank.groups))


def _is_in(group: GroupProgress) -> bool:
    """Whether the rank has not left the last collective that it entered."""
    return group.last_enqueued > group.last_completed


def _is_point_to_point(group: GroupProgress) -> bool:
    return any(word in group.last_enqueued_name for word in POINT_TO_POINT)


def _by_phase(evidence: Sequence[RankEvidence]) -> Verdict | None:
    in_step = [rank for rank in evidence if rank.phase in (Phase.STEP, Phase.COLLECTIVE)]
    elsewhere = [rank for rank in evidence if rank not in in_step]
    if not elsewhere or not in_step or 2 * len(elsewhere) > len(evidence):
        return None
    where = "while the others are in the step"
    reasons = [f"rank {rank.rank} is in phase {rank.phase} {where}{_seen_at(rank)}" for rank in elsewhere]
    return _named(elsewhere, 0.8, reasons)


def _by_stack(evidence: Sequence[RankEvidence]) -> Verdict | None:
    outside = [rank for rank in evidence if not any(word in rank.stack for word in COLLECTIVE_FRAMES)]
    if not all(rank.stack for rank in evidence) or not outside or 2 * len(outside) >= len(evidence):
        return None
    where = "is outside any collective while the others wait in one"
    return _named(outside, 0.7, [f"rank {rank.rank} {where}{_seen_at(rank)}" for rank in outside])


def _named(guilty: Sequence[RankEvidence], confidence: float, reasons: Sequence[str]) -> Verdict:
    return Verdict(ranks=tuple(sorted(rank.rank for rank in guilty)), confidence=confidence, reasons=tuple(reasons[:8]))


def _group_names(evidence: Sequence[RankEvidence]) -> list[str]:
    """Names of all groups, in the order in which ranks created them."""
    return list(dict.fromkeys(group.name for rank in evidence for group in rank.groups))


def _group(rank: RankEvidence, name: str) -> GroupProgress | None:
    return next((group for group in rank.groups if group.name == name and group.last_enqueued >= 0), None)


def _seen_at(rank: RankEvidence) -> str:
    """The innermost Python frame of the main thread, as ' (at file:line in function)'."""
    frame = top_frame(rank.stack)
    return f" (at {frame})" if frame else ""


def top_frame(stack: str) -> str:
    """The innermost frame of faulthandler's last thread, which is the main one: 'train.py:12 in step'."""
    lines = [line.strip() for line in stack.splitlines()]
    heads = [n for n, line in enumerate(lines) if line.startswith(("Thread ", "Current thread "))]
    if not heads or heads[-1] + 1 >= len(lines):
        return ""
    parts = lines[heads[-1] + 1].split('"')
    if len(parts) < 3:
        return ""
    where = parts[2].replace(", line ", ":").strip()
    return f"{parts[1].rsplit('/', 1)[-1]}{where}"
