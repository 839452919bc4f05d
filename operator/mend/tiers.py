"""Pure: how to recover from an incident, by the least disruptive means that can work and has not just failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mend import machines, strikes
from mend.incidents import FailureClass, Incident, IncidentKind, IncidentRecord, Strike, Tier, open_in_a_row
from mend.observation import Observation
from mend.presence import ENDED, workers_of, world_size
from mend.restore import candidates, roll_back_limit
from mend.ruleset import Rule, RuleAction
from mend.spec import FirstTier, Spec
from mend.status import RunStatus

FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """An incident to choose a tier for."""

    spec: Spec
    seen: Observation
    incident: Incident
    earlier: Sequence[IncidentRecord]  # the incidents before this one, oldest first
    now: float
    rule: Rule | None = None  # the user's, that the incident answers to
    given: Sequence[Strike] = ()  # the strikes that it gives

    @property
    def failed(self) -> Tier | None:
        """The tier that has just been tried: the run is not yet back from the incident before."""
        return (self.earlier[-1].tier or Tier.RESTART_RANKS) if open_in_a_row(self.earlier) else None

    @property
    def is_in_place(self) -> bool:
        """Whether another machine would mend nothing: neither the code nor the store and its checkpoints."""
        incident = self.incident
        is_of_checkpoints = incident.of_the_store or incident.kind is IncidentKind.CORRUPT
        return is_of_checkpoints or incident.failure is FailureClass.USER


def choose(
    spec: Spec,
    seen: Observation,
    incident: Incident,
    earlier: Sequence[IncidentRecord],
    now: float,
    rule: Rule | None = None,
    given: Sequence[Strike] = (),
) -> tuple[Tier, str]:
    """The tier and why: what the first row of the table that has something to say gives."""
    case = Case(spec, seen, incident, earlier, now, rule, given)
    for tier, says in TABLE:
        if why := says(case):
            return tier, why
    raise AssertionError("the last row always says something")


def _gives_up(case: Case) -> str:
    """Early, when trying again cannot help: that is kindness, the traceback is all there is."""
    spec, seen, incident, rule = case.spec, case.seen, case.incident, case.rule
    if rule is not None and rule.action is RuleAction.FAIL_RUN:
        return "as the rule says"
    if rule is None:  # whoever wrote a rule knows better what can help
        if incident.fatal:
            return "trying again cannot help"
        if _has_come_again(case):
            return f"the same failure twice ({incident.fingerprint})"
    budget = budget_of(spec, incident.failure)
    spent = seen.status.spent_within(incident.failure, spec.recovery.budgets.window_seconds, case.now)
    if draws(rule) and len(spent) >= budget:
        remedy = f"raise spec.recovery.budgets.{incident.failure}"
        return f"the budget of {budget} for failures of class {incident.failure} is used up ({remedy})"
    left = candidates(seen.uid, seen.status, seen.store.checkpoints)
    if incident.kind is IncidentKind.DIVERGED:
        stored = seen.store.checkpoints
        if roll_back_limit(seen.uid, seen.status, stored, incident.sound_before) is None:
            before = "the newest" if incident.sound_before is None else f"step {incident.sound_before}"
            return f"there is no checkpoint before {before} to roll back to"
    if incident.kind is IncidentKind.CORRUPT and not left and seen.store.checkpoints:
        return "no checkpoint of the run can be read any more; point spec.checkpoint.uri of a new run elsewhere"
    return ""


def _has_come_again(case: Case) -> bool:
    """Whether the same code has failed in the same way at the same step, so that a third try would be no other.

    Who has not stepped yet could be anywhere: the same words are then the same failure only if no step lies between.
    """
    incident, window = case.incident, case.spec.recovery.budgets.window_seconds
    lately = [each for each in case.earlier if case.now - each.detected_at < window]
    alike = [each for each in lately if each.fingerprint == incident.fingerprint]
    return bool(incident.fingerprint) and any(each.is_open or not incident.before_stepping for each in alike)


def _has_diverged(case: Case) -> str:
    if case.incident.kind is not IncidentKind.DIVERGED:
        return ""
    if case.incident.sound_before is not None:
        return f"what was saved from step {case.incident.sound_before} on may hold what made the loss go up"
    return "the newest checkpoint may already hold what made the loss diverge"


def _is_struck_enough(case: Case) -> str:
    """A node is to be kept away from once it has these strikes."""
    limit, book = case.spec.recovery.node_strikes.limit, strikes.merged(machines.book(case.seen), case.given)
    for node in dict.fromkeys(each.node for each in case.given):
        if strikes.is_excluded(book, node, limit, case.now):
            against = strikes.counting(book, node, case.now)
            if decisive := next((each.reason for each in against if each.decisive), ""):
                return f"{node}: {decisive}"
            return f"{node} has {len(against)} strikes of {limit}"
    return ""


def _is_gone(case: Case) -> str:
    return "its pod is gone or going" if case.incident.workers else ""


def _is_struck(case: Case) -> str:
    return f"{case.given[0].node} may be to blame, a strike is put against it" if case.given else ""


def _is_ruled(*actions: RuleAction) -> Callable[[Case], str]:
    return lambda case: "as the rule says" if case.rule is not None and case.rule.action in actions else ""


def _is_checked(case: Case) -> str:
    check = machines.check_due(case.spec, case.seen, case.incident, case.earlier, case.now)
    is_alone = case.failed is None and case.spec.recovery.first_tier is not FirstTier.REPLACE_WORKER
    return f"machines are checked while no ranks run: {check.why}" if check is not None and is_alone else ""


def _can_rejoin(case: Case) -> str:
    is_first = case.spec.recovery.first_tier is FirstTier.REJOIN and case.failed is None
    can = is_first and to_keep(case.spec, case.seen, case.incident)
    return "the other ranks can go on in their processes" if can else ""


def _is_first(case: Case) -> str:
    is_asked_for = case.spec.recovery.first_tier is FirstTier.REPLACE_WORKER and not case.is_in_place
    return "spec.recovery.firstTier" if is_asked_for else ""


def _has_failed_before(case: Case) -> str:
    if case.failed in (None, Tier.REJOIN) or case.is_in_place:
        return ""
    unknown = not workers_of(case.spec, case.seen, case.incident.verdict.ranks)
    why = "the recovery before has just failed"
    return f"{why}, and nobody is to blame: all pods are made anew" if unknown else why


def _otherwise(case: Case) -> str:
    return "all workers are there"


# The rows are asked in turn.
TABLE: tuple[tuple[Tier, Callable[[Case], str]], ...] = (
    (Tier.GIVE_UP, _gives_up),
    (Tier.ROLL_BACK, _has_diverged),
    (Tier.EXCLUDE_NODE, _is_struck_enough),
    (Tier.REPLACE_WORKER, _is_gone),
    (Tier.REPLACE_WORKER, _is_struck),
    (Tier.RESTART_RANKS, _is_ruled(RuleAction.RESTART)),
    (Tier.REPLACE_WORKER, _is_ruled(RuleAction.REPLACE_WORKER, RuleAction.EXCLUDE_NODE)),
    (Tier.RESTART_RANKS, _is_checked),
    (Tier.REJOIN, _can_rejoin),
    (Tier.REPLACE_WORKER, _is_first),
    (Tier.REPLACE_WORKER, _has_failed_before),
    (Tier.RESTART_RANKS, _otherwise),
)


def to_keep(spec: Spec, seen: Observation, incident: Incident) -> tuple[int, ...]:
    """The ranks whose processes can stay: all but the culprits', if each of them can; none otherwise."""
    is_of_ranks = incident.kind in (IncidentKind.CRASHED, IncidentKind.HUNG) and incident.verdict.is_known
    if not is_of_ranks or len(seen.ranks) < world_size(spec, seen):
        return ()
    others = [rank for rank in seen.ranks if rank.rank not in incident.verdict.ranks]
    return tuple(rank.rank for rank in others) if all(rank.can_rejoin for rank in others) else ()


def draws(rule: Rule | None) -> bool:
    """Whether the recovery is paid from a budget."""
    return rule is None or rule.action is not RuleAction.IGNORE


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


def launch_delay_seconds(status: RunStatus) -> float:
    """How long to wait before this launch: nothing at first, then doubling while recoveries keep failing."""
    broken = open_in_a_row(status.incidents) - 1
    return min(FIRST_DELAY_SECONDS * 2.0 ** (broken - 1), LONGEST_DELAY_SECONDS) if broken > 0 else 0.0
