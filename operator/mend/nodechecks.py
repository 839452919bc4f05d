"""Pure: the check of machines between two attempts: who is asked, how long it may take, and who is found wanting.

A machine is compared with the others of the gang, never with fixed figures: it is bad if it does less than half of what
the middle one of its peers does, if its numbers are wrong, or if the check dies or hangs there and not everywhere; and
only if a second round finds so too: a neighbour may have been busy during the first. The way between two machines is
measured from each to the one before and the one after it; the better of the two counts, so that a bad link shows at the
machine that has it and not at the one beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

from msgspec.structs import replace

from mend import machines, strikes
from mend.actions import Decision, EmitEvent, SendCheck
from mend.observation import Observation
from mend.orders import WAY_FIGURE, Checked
from mend.protocol import agent_url
from mend.records import recorded
from mend.seats import seats
from mend.spec import Spec
from mend.status import MAX_STRIKES, NodeCheck, RunStatus
from mend.transitions import with_actions

CHECK_SECONDS = 20.0  # at the most; measuring takes 3 of them, importing torch the rest where a machine is slow
ANSWER_SECONDS = 3.0  # on top: the order, the answer, and a controller that is busy
LOOK_SECONDS = 1.0
BAD_SHARE = 0.5  # of what its peers do
BAD_SHARE_OF_WAY = 0.25  # others use a network as well
ROUNDS = 2
MAX_PEERS = 8  # who are measured beside the suspects: the middle of eight is as good as that of a thousand


def check_machines(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """The check that is due is begun, waited for, and judged; None when there is none (any more). All are there."""
    check = seen.status.check
    if check is None:
        return None
    if check.until is None:
        return _begin(spec, seen, check, now)
    current = [each for each in seen.checks if (each.attempt, each.round) == (seen.status.attempt, check.round)]
    answers = {each.worker: each for each in current}
    missing = tuple(worker for worker in check.asked if worker not in answers)
    if missing and now < check.until <= now + CHECK_SECONDS + ANSWER_SECONDS:
        return Decision(
            status=seen.status,
            actions=_orders(seen, check, missing),
            reason="machines are checked",
            wake_after=LOOK_SECONDS,
        )
    told = {worker: answers[worker] for worker in check.asked if worker in answers}
    bad = judge(told)
    if bad and check.round < ROUNDS:
        return _ask(seen, replace(check, round=check.round + 1, doubted=tuple(bad)), now)
    bad = {worker: why for worker, why in bad.items() if worker in check.doubted}
    return _judged(spec, seen, bad, told, now)


def begun_anew(check: NodeCheck | None) -> NodeCheck | None:
    """A check into which another incident fell: the machines of another attempt will have to be asked."""
    return NodeCheck(why=check.why, suspects=check.suspects) if check is not None else None


def _begin(spec: Spec, seen: Observation, check: NodeCheck, now: float) -> Decision:
    seated = seats(spec, seen, now)
    suspects = [worker for worker in seated if worker in check.suspects or not check.suspects]
    peers = [worker for worker in seated if worker not in suspects]
    event = EmitEvent(type="Normal", reason="CheckingNodes", message=f"machines are checked: {check.why}")
    return with_actions(_ask(seen, replace(check, asked=tuple(sorted((*suspects, *peers[:MAX_PEERS])))), now), event)


def _ask(seen: Observation, check: NodeCheck, now: float) -> Decision:
    check = replace(check, until=now + CHECK_SECONDS + ANSWER_SECONDS)
    return Decision(
        status=replace(seen.status, check=check),
        actions=_orders(seen, check, check.asked),
        reason="machines are checked",
        wake_after=LOOK_SECONDS,
    )


def _orders(seen: Observation, check: NodeCheck, workers: Sequence[int]) -> tuple[SendCheck, ...]:
    """Orders to measure; repeated to who has not answered, which begins no second check."""
    return tuple(
        SendCheck(
            worker=agent.worker,
            pod_uid=agent.pod_uid,
            attempt=seen.status.attempt,
            round=check.round,
            seconds=CHECK_SECONDS,
            neighbours=_neighbours(seen, check, agent.worker),
        )
        for agent in seen.connected(workers)
    )


def _neighbours(seen: Observation, check: NodeCheck, worker: int) -> tuple[str, ...]:
    """Where the agents are of the workers asked before and after this one, in a ring."""
    ring = check.asked
    place = ring.index(worker)
    beside = dict.fromkeys((ring[place - 1], ring[(place + 1) % len(ring)]))
    pods = [seen.pod_of(other) for other in beside if other != worker]
    return tuple(agent_url(pod.ip) for pod in pods if pod is not None and pod.ip)


# ---------------------------------------------------------------- the verdict
def judge(answers: dict[int, Checked]) -> dict[int, str]:
    """The workers whose machines are bad, and why. Who has not answered is not judged: silence has other judges."""
    failed = {worker: f"the check {told.problem}" for worker, told in answers.items() if told.problem}
    if len(failed) == len(answers):
        return {}  # it fails everywhere: then it is not the machine
    slow = {worker: why for worker in answers if worker not in failed and (why := _why_slow(worker, answers))}
    return {**failed, **slow}


def _why_slow(worker: int, answers: dict[int, Checked]) -> str:
    """The first figure of which it has too little; none where it has no peers that measured the same."""
    for name, figure in answers[worker].figures.items():
        peers = [told.figures[name] for other, told in answers.items() if other != worker and name in told.figures]
        share = BAD_SHARE_OF_WAY if name == WAY_FIGURE else BAD_SHARE
        if peers and figure < share * median(peers):
            return f"{name} {figure / median(peers):.2f}x of its peers"
    return ""


def in_words(asked: Sequence[int], answers: dict[int, Checked], bad: dict[int, str]) -> tuple[str, ...]:
    """What the check has found, in sentences. That nothing was measured, or compared, is not that all is well."""
    if not answers:
        return (f"no worker answered (asked: {', '.join(map(str, asked))})",)
    failed = [f"worker {worker}: the check {told.problem}" for worker, told in sorted(answers.items()) if told.problem]
    silent = tuple(f"worker {worker} did not answer" for worker in asked if worker not in answers)
    if bad:
        return (*(f"worker {worker}: {why}" for worker, why in sorted(bad.items())), *silent)
    if len(failed) == len(answers):
        return (f"it went wrong wherever it was answered: {', '.join(failed)}", *silent)
    if len(answers) == 1:
        return (f"worker {next(iter(answers))} has no peer to be compared with", *silent)
    return ("no machine is much worse than its peers", *silent)


def _judged(spec: Spec, seen: Observation, bad: dict[int, str], told: dict[int, Checked], now: float) -> Decision:
    """What was found enters the incident; bad machines get a strike, and their workers new pods."""
    asked = seen.status.check.asked if seen.status.check is not None else ()
    reasons = tuple(f"node check: {each}" for each in in_words(asked, told, bad))
    status = _with_reasons(seen.status, reasons)
    number = status.open_incident.id if status.open_incident is not None else 0
    given = [
        machines.strike(spec, seen, node, f"node check: {bad[worker]}", number, now, decisive=True)
        for worker in sorted(bad)
        for node in machines.nodes_of(seen, (worker,))
    ]
    going = tuple(pod.uid for pod in seen.pods if pod.index in bad)
    status = replace(
        status,
        check=None,
        strikes=strikes.merged(status.strikes, given)[-MAX_STRIKES:],
        replacing=tuple(dict.fromkeys((*status.replacing, *going))),
    )
    kind, word = _event_of(bad, told)
    event = EmitEvent(type=kind, reason=word, message="; ".join(reasons))
    return Decision(status=status, actions=(event,), reason="machines were checked", wake_after=0.0)


def _event_of(bad: dict[int, str], told: dict[int, Checked]) -> tuple[Literal["Normal", "Warning"], str]:
    """Type and reason of the event that tells of a check."""
    if bad:
        return "Warning", "NodeCheckFailed"
    is_measured = any(not each.problem for each in told.values())
    return ("Normal", "NodesChecked") if is_measured else ("Warning", "NodesNotChecked")


def _with_reasons(status: RunStatus, reasons: tuple[str, ...]) -> RunStatus:
    """The status with these sentences added to the incident that the run is not yet back from."""
    record = status.open_incident
    if record is None:
        return status
    return recorded(status, replace(record, reasons=(*record.reasons, *reasons)))
