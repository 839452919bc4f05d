"""Pure: who did it. From the ranks' exits, or from evidence gathered before anything was killed."""

from __future__ import annotations

from collections.abc import Sequence

from mend.collectives import by_mismatch, by_waiting, is_waiting, named
from mend.evidence import RankEvidence
from mend.exitcodes import STORE_EXIT_CODES, ExitCode
from mend.heartbeats import Phase, RankExit, RankReport
from mend.incidents import Verdict
from mend.lostpeers import WORDS, is_of_a_lost_peer
from mend.stacks import seen_at

SLEEPING = frozenset("S")
STOPPED = frozenset("Tt")
UNINTERRUPTIBLE = frozenset("D")
DEAD = frozenset("ZXx")

WATCHDOG_WORDS = ("watchdog", "processgroupnccl")  # printed by torch's C++ before it aborts a rank whose peer is gone
TIMED_OUT = ("timeout", "timed out", *WORDS)
SIGABRT = 6
CLOSE_SECONDS = 0.05  # two failures closer than this cannot be put in order across workers
COLLECTIVE_FRAMES = ("all_reduce", "allreduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "_wait")
AT_WORK = (Phase.STEP, Phase.COLLECTIVE, Phase.EXITING)

UNKNOWN = Verdict(reasons=("the evidence does not say who",))
SYMMETRIC = Verdict(
    reasons=(
        "all ranks wait equally in the same collective: network or switch, no rank is blamed",
        "proposed: a node check on every worker before it trains again",
    )
)


def is_symptom(rank: RankReport) -> bool:
    """Whether this rank's end is what a peer's death does to a healthy rank."""
    error = rank.error
    if rank.exit is not None and rank.exit.code == ExitCode.AGENT_FAILED:
        return True  # its agent found no store to meet the others at
    if error is None:
        return rank.exit is not None and _is_aborted_by_watchdog(rank.exit)
    return is_of_a_lost_peer(error.type, error.message)


def of_crash(ended: Sequence[RankReport]) -> Verdict:
    """The culprit among ranks that have ended or raised: those whose end is no symptom; all, if all raised alike."""
    causes = [rank for rank in ended if not is_symptom(rank)]
    if causes and all(rank.exit is not None and rank.exit.code in STORE_EXIT_CODES for rank in causes):
        return _fault_of_the_store(causes)
    if not causes:
        return Verdict(reasons=("every rank that ended was only cut off by a peer",))
    first = max(causes, key=ended_age)
    guilty = [rank for rank in causes if _manner(rank) == _manner(first)]
    later = [rank for rank in causes if rank not in guilty]
    reasons = [f"rank {rank.rank} {how_it_ended(rank)}" for rank in guilty[:8]]
    reasons += [_how_much_later(rank, first) for rank in later[:8]]
    if innocent := len(ended) - len(causes):
        reasons.append(f"{innocent} more ended only because a peer was gone")
    is_close = any(ended_age(first) - ended_age(rank) < CLOSE_SECONDS for rank in later)
    confidence = 0.6 if is_close else 0.95 if len(guilty) == 1 else 0.8
    return Verdict(ranks=tuple(rank.rank for rank in guilty), confidence=confidence, reasons=tuple(reasons))


def _fault_of_the_store(causes: Sequence[RankReport]) -> Verdict:
    unsaved = any(rank.exit is not None and rank.exit.code == ExitCode.UNSAVED for rank in causes)
    what = "the last step cannot be saved" if unsaved else "no checkpoint can be read"
    return Verdict(reasons=(f"{what}, which is no rank's fault",))


def _manner(rank: RankReport) -> tuple[str | None, int | None, int | None]:
    """What two ends have in common that one fault explains: the type of exception, the signal, the exit code."""
    if rank.error is not None:
        return rank.error.type, None, None
    return None, rank.exit.signal if rank.exit else None, rank.exit.code if rank.exit else None


def _how_much_later(rank: RankReport, first: RankReport) -> str:
    """The first to fail draws others with it, and need not be the first to exit."""
    seconds = ended_age(first) - ended_age(rank)
    return f"rank {rank.rank} {how_it_ended(rank)} {seconds:.2f} s after rank {first.rank}"


def _is_aborted_by_watchdog(end: RankExit) -> bool:
    """Whether torch itself aborted the rank because a collective did not end: a signal, but no fault of this rank."""
    said = "\n".join(end.log_tail).lower()
    return end.signal == SIGABRT and all(any(word in said for word in words) for words in (WATCHDOG_WORDS, TIMED_OUT))


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


def of_hang(evidence: Sequence[RankEvidence], world_size: int, ranks_per_worker: int = 1) -> Verdict:
    """The culprit of a hang: the rank that is stopped, or that the others wait for; else unknown.

    The order is that of certainty: the kernel's word on the process, then who waits for whom in collectives, then
    another collective than the rest, then the phase, then the stack. All but the first compare ranks with each other,
    so they need all of them: among those that happened to answer, the odd one out may be the healthy one.
    """
    if verdict := _by_process_state(evidence, ranks_per_worker):
        return verdict
    held = held_together(evidence, ranks_per_worker)
    if len(evidence) < world_size:
        return Verdict(reasons=(f"only {len(evidence)} of {world_size} ranks could be asked, and these cannot say",))
    for witness in (by_waiting, by_mismatch, _by_recorder, _by_phase, _by_stack):
        if verdict := witness(evidence):
            return _shared(held) if set(verdict.ranks) & set(held) else verdict
    if held:
        return _shared(held)
    return SYMMETRIC if len(evidence) > 1 and all(map(is_waiting, evidence)) else UNKNOWN


def held_together(evidence: Sequence[RankEvidence], ranks_per_worker: int = 1) -> tuple[int, ...]:
    """The ranks that hang in the kernel, if they are on several workers, or all: for what they share, then."""
    found = tuple(rank.rank for rank in evidence if rank.process_state in UNINTERRUPTIBLE)
    workers = {rank // ranks_per_worker for rank in found}
    return found if len(workers) > 1 or len(found) == len(evidence) else ()


def _shared(held: Sequence[int]) -> Verdict:
    some = ", ".join(map(str, held[:8])) + (", ..." if len(held) > 8 else "")
    words = "hang in the kernel together (state D): a file system or network that they share, no rank is blamed"
    return Verdict(reasons=(f"ranks {some} {words}",))


def of_abandonment(living: Sequence[RankEvidence], world_size: int, ranks_per_worker: int = 1) -> Verdict:
    """The culprit where all that ended were only cut off: who is stuck, or who lives and waits in no collective.

    `world_size` counts the living. A rank that closed its connections and is still busy with its own end, writing a
    dump perhaps, has cut off the others and not yet said why.
    """
    verdict = of_hang(living, world_size, ranks_per_worker)
    if verdict.is_known or len(living) < world_size:
        return verdict
    apart = [rank for rank in living if rank.recorder_answered and not is_waiting(rank) and rank.phase in AT_WORK]
    if len(apart) != 1:
        return verdict
    words = "has cut off its peers: it lives and waits in no collective"
    return named(apart, 0.6, [f"rank {apart[0].rank} {words}{seen_at(apart[0])}"])


def _by_process_state(evidence: Sequence[RankEvidence], ranks_per_worker: int) -> Verdict | None:
    for states, words, confidence in (
        (STOPPED, "is stopped (state T)", 0.98),
        (DEAD, "is dead (state Z)", 0.95),
        (UNINTERRUPTIBLE, "hangs in the kernel (state D: disk, driver or network file system)", 0.9),
    ):
        found = [rank for rank in evidence if rank.process_state in states]
        shared = states is UNINTERRUPTIBLE and held_together(evidence, ranks_per_worker)
        if found and not shared:
            return named(found, confidence, [f"rank {rank.rank} {words}" for rank in found])
    return None


def _by_recorder(evidence: Sequence[RankEvidence]) -> Verdict | None:
    """A rank whose C++ worker server does not answer, although it needs no Python, while the others' do."""
    mute = [rank for rank in evidence if not rank.recorder_answered]
    others = [rank for rank in evidence if rank.recorder_answered]
    if not mute or len(mute) >= len(others) or not all(map(is_waiting, others)):
        return None
    return named(mute, 0.7, [f"rank {rank.rank} does not answer while the others wait" for rank in mute])


def _by_phase(evidence: Sequence[RankEvidence]) -> Verdict | None:
    in_step = [rank for rank in evidence if rank.phase in (Phase.STEP, Phase.COLLECTIVE)]
    elsewhere = [rank for rank in evidence if rank not in in_step]
    if not elsewhere or not in_step or 2 * len(elsewhere) > len(evidence):
        return None
    where = "while the others are in the step"
    reasons = [f"rank {rank.rank} is in phase {rank.phase} {where}{seen_at(rank)}" for rank in elsewhere]
    return named(elsewhere, 0.8, reasons)


def _by_stack(evidence: Sequence[RankEvidence]) -> Verdict | None:
    outside = [rank for rank in evidence if not any(word in rank.stack for word in COLLECTIVE_FRAMES)]
    if not all(rank.stack for rank in evidence) or not outside or 2 * len(outside) >= len(evidence):
        return None
    where = "is outside any collective while the others wait in one"
    return named(outside, 0.7, [f"rank {rank.rank} {where}{seen_at(rank)}" for rank in outside])
