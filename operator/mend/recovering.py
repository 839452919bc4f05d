"""Pure: what is done about an incident: evidence first, then the verdict, then a new attempt or the end."""

from __future__ import annotations

from msgspec.structs import replace

from mend import machines, strikes, tiers
from mend.actions import AnyAction, Decision, EmitEvent, LiftStrikes, SendGather
from mend.assembling import assemble
from mend.diagnose import diagnose, valid_evidence
from mend.goodput import account, book_detection
from mend.incidents import FailureClass, Incident, IncidentRecord, Strike, Tier
from mend.nodechecks import begun_anew
from mend.noted import with_progress
from mend.observation import Observation
from mend.presence import gang_step
from mend.records import GATHER_SECONDS, event_reason, judged, kept, last_words, opened, recorded, under_inquiry
from mend.restore import roll_back_limit
from mend.rules import rule_for
from mend.ruleset import Rule, RuleAction
from mend.spec import Spec
from mend.status import MAX_STRIKES, RunPhase, RunStatus
from mend.transitions import failed, next_attempt, with_actions

PUNCTUAL_SECONDS = 0.5  # who waits for answers looks at them that soon after their time is up
INQUIRY_SECONDS = 30.0  # no asking again after that


def recovering(spec: Spec, seen: Observation, now: float) -> Decision | None:
    """An incident is visible, or was and is under inquiry."""
    incident, record = diagnose(spec, seen), under_inquiry(seen.status)
    if incident is None:
        # That nothing is visible may only mean that a new controller has not heard enough yet.
        moved = record is not None and gang_step(seen) > record.step
        return _went_on(seen, record, now) if record is not None and moved else None
    if record is None:
        record = opened(seen, incident, now)
        if incident.needs_evidence:
            return _inquire(seen, record)
    elif incident.needs_evidence:
        left = (record.gather_until or now) - now
        if 0 < left <= GATHER_SECONDS:
            return Decision(status=seen.status, reason="gathering evidence", wake_after=left)
        unheard = left < -PUNCTUAL_SECONDS and not valid_evidence(seen)  # who asked has died with the answers
        if unheard and now - record.detected_at < INQUIRY_SECONDS:
            return _inquire(seen, replace(record, gather_until=now + GATHER_SECONDS))
    if incident.patience_seconds > 0:
        wait = min(incident.patience_seconds, spec.health.heartbeat_seconds)
        why = incident.awaiting or "it may yet go on by itself"
        return Decision(status=seen.status, reason=f"hung, but {why}", wake_after=wait)
    return _recover(spec, seen, incident, record, now)


def _inquire(seen: Observation, record: IncidentRecord) -> Decision:
    """Asks all participants at once; a lost question costs the verdict, not the recovery."""
    asks = tuple(
        SendGather(worker=agent.worker, pod_uid=agent.pod_uid, attempt=seen.status.attempt, seconds=GATHER_SECONDS)
        for agent in seen.connected(seen.status.participants)
    )
    event = EmitEvent(type="Warning", reason=event_reason(record), message=record.summary)
    return Decision(
        status=recorded(seen.status, record),
        actions=(*asks, event),
        reason="evidence before action",
        wake_after=GATHER_SECONDS,
    )


def _went_on(seen: Observation, record: IncidentRecord, now: float) -> Decision:
    summary = f"{record.summary}; went on by itself"
    done = replace(record, gather_until=None, recovered_at=now, steps_lost=0, summary=summary)
    event = EmitEvent(type="Normal", reason="WentOn", message=f"attempt {record.attempt} went on by itself")
    # Of pauses only the newest is kept: they cost nothing, and must not push out what did.
    earlier = tuple(each for each in seen.status.incidents if each.is_open or each.tier is not None)
    status = recorded(replace(seen.status, incidents=earlier), done)
    return Decision(status=status, actions=(event,), reason="progress was resumed", wake_after=0.0)


def _recover(spec: Spec, seen: Observation, incident: Incident, record: IncidentRecord, now: float) -> Decision:
    earlier = [each for each in seen.status.incidents if each.id != record.id]
    rule = rule_for(spec, seen, incident)
    if rule is not None and rule.budget is not None:
        incident = replace(incident, failure=FailureClass(rule.budget))
    given = _strikes(spec, seen, incident, record, earlier, rule, now)
    refuted = machines.refuted(spec, seen, incident, earlier, now)
    tier, why = tiers.choose(spec, seen, incident, earlier, now, rule, given)
    record = judged(spec, seen, record, incident, tier, rule.name if rule is not None else "")
    record, keeping = kept(spec, seen, record)
    seen = replace(seen, status=_booked(seen, record, now))
    ruled = f" (rule {record.rule})" if record.rule else ""
    event = EmitEvent(
        type="Warning",
        reason=event_reason(record),
        message=f"{record.summary} (step {record.step}, attempt {record.attempt}); {tier}: {why}{ruled}",
    )
    if tier is Tier.GIVE_UP:
        cause = last_words(seen, incident)
        return with_actions(
            failed(seen, "GaveUp", "\n".join(filter(None, (f"{record.summary}; {why}", cause))), now),
            event,
            *keeping,
        )
    status = _prepared(spec, seen, incident, tier, now, rule)
    booked = strikes.lifted(strikes.merged(status.strikes, given), [each.id for each in refuted])
    status = replace(status, strikes=booked[-MAX_STRIKES:])
    status = next_attempt(replace(seen, status=status), now, RunPhase.RECOVERING)
    due = machines.check_due(spec, seen, incident, earlier, now)
    status = replace(status, check=due or begun_anew(status.check))
    if tier is Tier.REJOIN:
        status = replace(status, keep=tiers.to_keep(spec, seen, incident))
    told = (event, *_said_of(given), *_lifting(refuted), *keeping)
    return with_actions(assemble(spec, replace(seen, status=status), now), *told)


def _strikes(
    spec: Spec,
    seen: Observation,
    incident: Incident,
    record: IncidentRecord,
    earlier: list[IncidentRecord],
    rule: Rule | None,
    now: float,
) -> tuple[Strike, ...]:
    """The strikes that an incident gives; a rule may ask for one, or take the recovery in hand without any."""
    if rule is None or rule.action is RuleAction.IGNORE:
        return machines.strikes_for(spec, seen, incident, record.id, earlier, now)
    if rule.action is not RuleAction.EXCLUDE_NODE:
        return ()
    nodes = machines.nodes_of(seen, machines.culprits(spec, seen, incident))
    why = f"rule {rule.name}: {incident.summary}"
    return tuple(machines.strike(spec, seen, node, why, record.id, now, decisive=True) for node in nodes)


def _said_of(given: tuple[Strike, ...]) -> tuple[EmitEvent, ...]:
    return tuple(
        EmitEvent(type="Warning", reason="NodeStruck", message=f"a strike against {each.node}: {each.reason}")
        for each in given
    )


def _lifting(refuted: tuple[Strike, ...]) -> tuple[AnyAction, ...]:
    if not refuted:
        return ()
    nodes = ", ".join(sorted({each.node for each in refuted}))
    message = f"what came again and again on {nodes} comes elsewhere as well: these strikes are lifted"
    event = EmitEvent(type="Normal", reason="StrikesLifted", message=message)
    return LiftStrikes(ids=tuple(each.id for each in refuted)), event


def _booked(seen: Observation, record: IncidentRecord, now: float) -> RunStatus:
    """The status with the incident in its record and its time in the ledger."""
    status = account(recorded(with_progress(seen.status, seen), record), now)
    if status.phase is RunPhase.RUNNING:
        status = replace(status, ledger=book_detection(status.ledger, record))
    return status


def _prepared(
    spec: Spec, seen: Observation, incident: Incident, tier: Tier, now: float, rule: Rule | None
) -> RunStatus:
    """The status with the budget drawn on and what the tier asks for."""
    status = replace(seen.status, recoveries=seen.status.recoveries + 1)
    if tiers.draws(rule):
        spent = (*status.spent_within(incident.failure, spec.recovery.budgets.window_seconds, now), now)
        status = replace(status, spent={**status.spent, incident.failure: spent})
    if tier is Tier.ROLL_BACK:
        limit = roll_back_limit(seen.uid, status, seen.store.checkpoints, incident.sound_before)
        status = replace(status, roll_back_before=limit)
    gone = tiers.ended_pods(seen)
    if tier in machines.REPLACED:
        going = tiers.to_replace(spec, seen, incident)
        gone += tuple(pod.uid for pod in seen.pods if pod.index in going)
    return replace(status, replacing=tuple(dict.fromkeys((*status.replacing, *gone))))
