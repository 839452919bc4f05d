"""Pure: who waits for whom in collectives, as the flight recorders of all ranks tell when they are put side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mend.evidence import GroupProgress, RankEvidence
from mend.incidents import Verdict
from mend.stacks import is_in_own_code, seen_at

POINT_TO_POINT = (":send", ":recv")
HABIT_PERIODS = 3  # a sequence of collectives foretells the next one once it has come round so often


def by_waiting(evidence: Sequence[RankEvidence]) -> Verdict | None:
    """Who is waited for and waits for nobody: a rank that lags in one group may itself be stuck in another."""
    waits = {rank.rank: _waited_for(rank, evidence) for rank in evidence}
    awaited = {other for others in waits.values() for other in others}
    # Who is in a collective itself waits for data, as the others do: a ring that breaks stops its ranks at different
    # places, one of them perhaps a collective behind.
    guilty = [rank for rank in evidence if rank.rank in awaited and not waits[rank.rank] and not is_waiting(rank)]
    # One that ran ahead makes all others look late: a majority that waits for nobody is not blamed.
    if not guilty or 2 * len(guilty) > len(evidence):
        return None
    waiting = sum(1 for others in waits.values() if others & {rank.rank for rank in guilty})
    reasons = [_why_awaited(rank, evidence, waiting) for rank in guilty]
    return named(guilty, 0.95 if len(guilty) == 1 else 0.8, reasons)


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
            return f"rank {rank.rank}: {waiting} others wait in {which}, {have}{seen_at(rank)}"
    return f"rank {rank.rank}: {waiting} others wait for it"


def by_mismatch(evidence: Sequence[RankEvidence]) -> Verdict | None:
    """Who entered another collective than the rest, where all have entered equally many and are stuck."""
    for name in _group_names(evidence):
        entered = {rank: group for rank in evidence if (group := _group(rank, name)) is not None}
        same_count = len({group.last_enqueued for group in entered.values()}) == 1
        stuck = same_count and any(map(_is_in, entered.values()))
        called = Counter(group.last_enqueued_name for group in entered.values() if group.last_enqueued_name)
        if not stuck or len(called) < 2 or any(map(_is_point_to_point, entered.values())):
            continue
        (usual, votes), *_ = called.most_common()
        odd = [rank for rank, group in entered.items() if group.last_enqueued_name not in ("", usual)]
        if votes <= len(odd):
            return _by_habit(name, evidence) or Verdict(
                reasons=(f"the ranks entered different collectives, {' or '.join(sorted(called))}",)
            )
        did = [(rank.rank, f"entered {_called(rank, name)} where the others entered {usual}") for rank in odd]
        return named(odd, 0.85, [f"rank {number} {words}" for number, words in did])
    return None


def _by_habit(name: str, evidence: Sequence[RankEvidence]) -> Verdict | None:
    """Who left the sequence that all ranks had kept to until then; as good as a majority where there is none.

    Not across phases or steps: a rank that goes on to an evaluation leaves the sequence too, and rightly.
    """
    if len({(rank.phase, rank.step) for rank in evidence}) > 1:
        return None
    foretold = {foretell(group.recent_names[:-1]) for rank in evidence if (group := _group(rank, name)) is not None}
    usual = foretold.pop() if len(foretold) == 1 else ""
    odd = [rank for rank in evidence if _called(rank, name) not in ("", usual)]
    if not usual or not odd or len(odd) == len(evidence):
        return None
    words = f"where its collectives so far foretell {usual}, which the others entered"
    return named(odd, 0.7, [f"rank {rank.rank} entered {_called(rank, name)} {words}" for rank in odd])


def foretell(names: Sequence[str]) -> str:
    """What comes next in a sequence that has come round three times or more; "" if it has not."""
    for period in range(1, len(names) // HABIT_PERIODS + 1):
        if all(name == names[n] for n, name in enumerate(names[period:])):
            return names[-period]
    return ""


def _called(rank: RankEvidence, name: str) -> str:
    group = _group(rank, name)
    return group.last_enqueued_name if group is not None else ""


def is_waiting(rank: RankEvidence) -> bool:
    """Whether it is in a collective that it has not left.

    The recorder alone does not prove it: gloo now and then does not count a collective as completed when it has been.
    """
    return any(map(_is_in, rank.groups)) and not is_in_own_code(rank.stack)


def _is_in(group: GroupProgress) -> bool:
    """Whether the rank has not left the last collective that it entered."""
    return group.last_enqueued > group.last_completed


def _is_point_to_point(group: GroupProgress) -> bool:
    return any(word in group.last_enqueued_name for word in POINT_TO_POINT)


def named(guilty: Sequence[RankEvidence], confidence: float, reasons: Sequence[str]) -> Verdict:
    """A verdict against these ranks."""
    return Verdict(ranks=tuple(sorted(rank.rank for rank in guilty)), confidence=confidence, reasons=tuple(reasons[:8]))


def _group_names(evidence: Sequence[RankEvidence]) -> list[str]:
    """Names of all groups, in the order in which ranks created them."""
    return list(dict.fromkeys(group.name for rank in evidence for group in rank.groups))


def _group(rank: RankEvidence, name: str) -> GroupProgress | None:
    return next((group for group in rank.groups if group.name == name and group.last_enqueued >= 0), None)
