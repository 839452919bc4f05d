"""Pure: whether a machine is to blame for an incident, and which strikes that gives it.

Nobody's good name is at stake lightly: a strike needs a verdict of at least `SURE`, and a cause that is the machine's.
Exceptions of the training code, preemptions, verdicts of `unknown` and stalls in which all ranks wait alike give none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from mend import strikes
from mend.incidents import FailureClass, Incident, IncidentKind, IncidentRecord, Strike, Tier
from mend.observation import Observation
from mend.presence import workers_of
from mend.spec import NodeChecks, Spec
from mend.status import NodeCheck

SURE = 0.8
CERTAIN = 0.98  # of a verdict that leaves nothing to be checked
CRASHES_BEFORE = 2  # on one node and on no other: with fewer, chance would do as an explanation
REPLACED = (Tier.REPLACE_WORKER, Tier.EXCLUDE_NODE)
OF_RANKS = (IncidentKind.CRASHED, IncidentKind.HUNG)
BLAMELESS = (FailureClass.USER, FailureClass.PREEMPTION)


def check_due(
    spec: Spec, seen: Observation, incident: Incident, earlier: Sequence[IncidentRecord], now: float
) -> NodeCheck | None:
    """The check of machines that should come before the next attempt: never in a recovery whose cause is plain.

    That of a crash is, be it a signal or an exception. Of a hang it is known who, and not why, unless it is stopped.
    """
    window = spec.recovery.budgets.window_seconds
    # A pause, which has no tier, ended by itself: it asks for no explanation.
    earlier = [each for each in earlier if now - each.detected_at < window and each.tier is not None]
    blamed = culprits(spec, seen, incident)
    if spec.recovery.node_check is NodeChecks.NEVER:
        return None
    if spec.recovery.node_check is NodeChecks.ALWAYS:
        return NodeCheck(why="spec.recovery.nodeCheck is Always", suspects=blamed)
    doubtful = [each for each in earlier if each.kind is IncidentKind.HUNG and each.confidence < CERTAIN]
    again = tuple(worker for worker in blamed if any(worker in each.culprit_workers for each in doubtful))
    if again and incident.kind is IncidentKind.HUNG and incident.verdict.confidence < CERTAIN:
        return NodeCheck(why=f"worker {again[0]} is suspected again", suspects=again)
    last = earlier[-1] if earlier else None
    if incident.kind is IncidentKind.HUNG and not blamed and last is not None and last.kind is IncidentKind.HUNG:
        return NodeCheck(why="twice in a row nobody was to blame") if not last.culprit_workers else None
    return None


def book(seen: Observation) -> tuple[Strike, ...]:
    """The strikes of all runs, with those of this one that the book does not have yet."""
    return strikes.merged(seen.strikes, seen.status.strikes)


def excluded(spec: Spec, seen: Observation, now: float) -> tuple[str, ...]:
    """The nodes that the run's pods are to keep away from."""
    return strikes.excluded(book(seen), spec.recovery.node_strikes.limit, now)


def culprits(spec: Spec, seen: Observation, incident: Incident) -> tuple[int, ...]:
    """The workers that the verdict blames."""
    known = workers_of(spec, seen, incident.verdict.ranks)
    return known or (incident.workers if incident.verdict.confidence > 0 else ())


def nodes_of(seen: Observation, workers: Sequence[int]) -> tuple[str, ...]:
    """The nodes that these workers are on, as far as they are on one."""
    found = [pod.node for worker in workers if (pod := seen.pod_of(worker)) is not None and pod.node]
    return tuple(dict.fromkeys(found))


def strikes_for(
    spec: Spec, seen: Observation, incident: Incident, number: int, earlier: Sequence[IncidentRecord], now: float
) -> tuple[Strike, ...]:
    """The strikes that incident `number` gives; none unless the verdict is sure and a machine is to blame."""
    is_of_checkpoints = incident.of_the_store or incident.kind is IncidentKind.CORRUPT
    if incident.verdict.confidence < SURE or incident.failure in BLAMELESS or is_of_checkpoints:
        return ()
    lately = [each for each in earlier if now - each.detected_at < spec.recovery.node_strikes.expire_after_seconds]
    blamed = culprits(spec, seen, incident)
    is_of_one = len(nodes_of(seen, blamed)) == 1
    found = [
        replace(strike(spec, seen, node, reason, number, now, decisive=decisive), presumed=presumed)
        for worker in blamed
        for node in nodes_of(seen, (worker,))
        for reason, decisive, presumed in _faults(seen, incident, lately, worker, node, is_of_one=is_of_one)
    ]
    return strikes.merged((), found)


def strike(spec: Spec, seen: Observation, node: str, reason: str, number: int, now: float, *, decisive: bool) -> Strike:
    """A strike of this run against a node, for its incident of this number."""
    return Strike(
        id=f"{seen.uid}/{number}/{node}",
        node=node,
        run=f"{seen.namespace}/{seen.name}",
        reason=reason,
        struck_at=now,
        expires_at=now + spec.recovery.node_strikes.expire_after_seconds,
        decisive=decisive,
    )


def refuted(
    spec: Spec, seen: Observation, incident: Incident, earlier: Sequence[IncidentRecord], now: float
) -> tuple[Strike, ...]:
    """The presumed strikes of the run that do not hold: before it was back, the same came on another node as well."""
    is_of_ranks = incident.kind in OF_RANKS and incident.failure not in BLAMELESS
    since = next((each.detected_at for each in earlier if each.is_open), None)
    elsewhere = nodes_of(seen, culprits(spec, seen, incident))
    if since is None or not is_of_ranks or incident.verdict.confidence < SURE or not elsewhere:
        return ()
    run = f"{seen.namespace}/{seen.name}"
    given = [each for each in book(seen) if each.run == run and each.presumed and each.struck_at >= since]
    return tuple(each for each in given if each.node not in elsewhere and not each.lifted and now < each.expires_at)


def _faults(
    seen: Observation,
    incident: Incident,
    earlier: Sequence[IncidentRecord],
    worker: int,
    node: str,
    *,
    is_of_one: bool,
) -> Iterator[tuple[str, bool, bool]]:
    """Why this node is to blame, whether that is decisive, and whether presumed; `is_of_one`: all culprits are on it.

    What is only seen again and again speaks against a machine as long as it is seen nowhere else. Before the first step
    it is not decisive even then: a program that fails at its start does so on any machine.
    """
    if (reason := incident.machine_faults.get(worker)) is not None:
        yield reason, False, False
    elif is_of_one and _crashes_here_only(seen, incident, earlier, node):
        yield f"worker {worker}: ranks crash on {node} again and again, and nowhere else", False, True
    if is_of_one and _was_replaced_in_vain(incident, earlier, node):
        reason = f"worker {worker}: a new pod on {node} went wrong as the one before"
        yield reason, not incident.before_stepping, incident.kind in OF_RANKS


def _crashes_here_only(seen: Observation, incident: Incident, earlier: Sequence[IncidentRecord], node: str) -> bool:
    """Ranks were killed by a signal, or by their device, here before, and on none of the run's other nodes."""
    if incident.kind is not IncidentKind.CRASHED or len(nodes_of(seen, seen.status.participants)) < 2:
        return False
    crashed = [
        each
        for each in earlier
        if each.kind is IncidentKind.CRASHED and each.failure is FailureClass.INFRASTRUCTURE and each.culprit_nodes
    ]
    return len(crashed) >= CRASHES_BEFORE and all(each.culprit_nodes == (node,) for each in crashed)


def _was_replaced_in_vain(incident: Incident, earlier: Sequence[IncidentRecord], node: str) -> bool:
    """The recovery before, which has just failed, replaced a worker on this very node, that was surely to blame.

    Ranks must be named both times: who is merely not heard before a launch may be well, and the controller cut off.
    Where ranks ended or hung on another node as well, a fault that moves with the program explains more.
    """
    last = earlier[-1] if earlier else None
    return (
        last is not None
        and last.is_open
        and last.tier in REPLACED
        and last.confidence >= SURE
        and last.failure not in BLAMELESS
        and last.culprit_nodes == (node,)
        and not any(_is_of_ranks_elsewhere(each, node) for each in earlier)
        and incident.verdict.is_known
        and bool(last.culprit_ranks)
    )


def _is_of_ranks_elsewhere(record: IncidentRecord, node: str) -> bool:
    """Ranks were to blame on another node, and not by an error of the training code or by being sent away."""
    is_of_ranks = record.kind in OF_RANKS and record.failure not in BLAMELESS
    return is_of_ranks and any(each != node for each in record.culprit_nodes)
