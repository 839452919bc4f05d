"""Pure: how to recover from an incident, by the least disruptive means that can work and has not just failed."""

from __future__ import annotations

from collections.abc import Sequence

from mend.model import FailureClass, Incident, IncidentKind, IncidentRecord, Observation, RunStatus, Tier
from mend.presence import ENDED, workers_of
from mend.restore import candidates
from mend.spec import FirstTier, Spec

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0


def choose(
    spec: Spec, seen: Observation, incident: Incident, earlier: Sequence[IncidentRecord], now: float
) -> tuple[Tier, str]:
    """The tier and why; `earlier` are the incidents before this one, oldest first.

    Giving up early when trying again cannot help is kindness: the traceback is all there is.
    """
    if why := _why_give_up(spec, seen, incident, earlier, now):
        return Tier.GIVE_UP, why
    if incident.kind is IncidentKind.DIVERGED:
        return Tier.ROLL_BACK, "the newest checkpoint may already hold what made the loss diverge"
    if incident.workers:
        return Tier.REPLACE_WORKER, "its pod is gone or going"
    first = spec.recovery.first_tier
    has_failed = open_in_a_row(earlier) > 0
    if first is FirstTier.REJOIN and not has_failed and to_keep(spec, seen, incident):
        return Tier.REJOIN, "the other ranks can go on in their processes"
    in_place = incident.failure is FailureClass.USER or incident.of_the_store or incident.kind is IncidentKind.CORRUPT
    if first is FirstTier.REPLACE_WORKER and not in_place:
        return Tier.REPLACE_WORKER, "spec.recovery.firstTier"
    is_worth_another = has_failed and earlier[-1].tier is not Tier.REJOIN and not in_place
    if is_worth_another:  # another machine would mend neither the code nor the checkpoints
        why = "the recovery before has just failed"
        unknown = not workers_of(spec, seen, incident.verdict.ranks)
        return Tier.REPLACE_WORKER, f"{why}, and nobody is to blame: all pods are made anew" if unknown else why
    return Tier.RESTART_RANKS, "all workers are there"


def _why_give_up(
    spec: Spec, seen: Observation, incident: Incident, earlier: Sequence[IncidentRecord], now: float
) -> str:
    if incident.fatal:
        return "trying again cannot help"
    if _has_come_again(spec, incident, earlier, now):
        return f"the same failure twice ({incident.fingerprint})"
    budget = budget_of(spec, incident.failure)
    if len(spent_within(spec, seen.status, incident.failure, now)) >= budget:
        remedy = f"raise spec.recovery.budgets.{incident.failure}"
        return f"the budget of {budget} for failures of class {incident.failure} is used up ({remedy})"
    left = candidates(seen.uid, seen.status, seen.store.checkpoints)
    if incident.kind is IncidentKind.DIVERGED and len(left) < 2:
        return "there is no checkpoint before the newest to roll back to"
    if incident.kind is IncidentKind.CORRUPT and not left and seen.store.checkpoints:
        return "no checkpoint of the run can be read any more; point spec.checkpoint.uri of a new run elsewhere"
    return ""


def _has_come_again(spec: Spec, incident: Incident, earlier: Sequence[IncidentRecord], now: float) -> bool:
    """Whether the same code has failed in the same way at the same step, so that a third try would be no other.

    Who has not stepped yet could be anywhere: the same words are then the same failure only if no step lies between.
    """
    window = spec.recovery.budgets.window_seconds
    alike = [each for each in earlier if each.fingerprint == incident.fingerprint and now - each.detected_at < window]
    return bool(incident.fingerprint) and any(each.is_open or not incident.before_stepping for each in alike)


def to_keep(spec: Spec, seen: Observation, incident: Incident) -> tuple[int, ...]:
    """The ranks whose processes can stay: all but the culprits', if each of them can; none otherwise."""
    is_of_ranks = incident.kind in (IncidentKind.CRASHED, IncidentKind.HUNG) and incident.verdict.is_known
    if not is_of_ranks or len(seen.ranks) < spec.workers.ranks_per_worker * len(seen.status.participants):
        return ()
    others = [rank for rank in seen.ranks if rank.rank not in incident.verdict.ranks]
    return tuple(rank.rank for rank in others) if all(rank.can_rejoin for rank in others) else ()


def to_replace(spec: Spec, seen: Observation, incident: Incident) -> tuple[int, ...]:
    """Workers whose pods are to be made anew: those that are gone, else the culprits', else, nobody known, all."""
    if incident.workers:
        return incident.workers
    return workers_of(spec, seen, incident.verdict.ranks) or seen.status.participants


def ended_pods(seen: Observation) -> tuple[str, ...]:
    """Uids of pods that cannot hold ranks any more, for example since theirs had finished before another's broke."""
    return tuple(pod.uid for pod in seen.pods if pod.phase in ENDED)


def budget_of(spec: Spec, failure: FailureClass) -> int:
    """Recoveries allowed per window."""
    budgets = spec.recovery.budgets
    return {
        FailureClass.USER: budgets.user,
        FailureClass.INFRASTRUCTURE: budgets.infrastructure,
        FailureClass.HANG: budgets.hang,
        FailureClass.PREEMPTION: budgets.preemption,
    }[failure]


def spent_within(spec: Spec, status: RunStatus, failure: FailureClass, now: float) -> tuple[float, ...]:
    """When this budget was drawn on within the window."""
    return tuple(at for at in status.spent.get(failure, ()) if now - at < spec.recovery.budgets.window_seconds)


def open_in_a_row(incidents: Sequence[IncidentRecord]) -> int:
    """How many of the latest incidents the run is not yet back from: all but the first broke a recovery."""
    count = 0
    for incident in reversed(incidents):
        if not incident.is_open:
            break
        count += 1
    return count


def launch_delay_seconds(status: RunStatus) -> float:
    """How long to wait before this launch: nothing at first, then doubling while recoveries keep failing."""
    broken = open_in_a_row(status.incidents) - 1
    return min(FIRST_DELAY_SECONDS * 2.0 ** (broken - 1), LONGEST_DELAY_SECONDS) if broken > 0 else 0.0
