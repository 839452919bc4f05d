"""Pure: the record of incidents in a run's status, from detection to the first new step."""

from __future__ import annotations

from msgspec.structs import replace

from mend.actions import KeepEvidence
from mend.goodput import book_lost_steps
from mend.incidents import Incident, IncidentKind, IncidentRecord, Tier
from mend.keys import incident_key
from mend.machines import culprits, nodes_of
from mend.observation import Observation
from mend.presence import gang_step
from mend.spec import Spec
from mend.status import MAX_INCIDENTS, RunStatus

GATHER_SECONDS = 2.0
LAST_WORDS_CHARACTERS = 8192  # the last of a traceback says most


def opened(seen: Observation, incident: Incident, now: float) -> IncidentRecord:
    """A record of what is seen, before it is known what to do."""
    status = seen.status
    return IncidentRecord(
        id=max((each.id for each in status.incidents), default=0) + 1,
        kind=incident.kind,
        failure=incident.failure,
        attempt=status.attempt,
        step=gang_step(seen),
        summary=incident.summary,
        began_at=now - incident.age_seconds,
        detected_at=now,
        gather_until=now + GATHER_SECONDS if incident.needs_evidence else None,
    )


def judged(
    spec: Spec, seen: Observation, record: IncidentRecord, incident: Incident, tier: Tier, rule: str = ""
) -> IncidentRecord:
    """The record with the verdict and what is done; the incident may have turned out to be another than it seemed."""
    verdict = incident.verdict
    blamed = culprits(spec, seen, incident)
    return replace(
        record,
        kind=incident.kind,
        failure=incident.failure,
        fingerprint=incident.fingerprint,
        culprit_ranks=verdict.ranks,
        culprit_workers=blamed,
        culprit_nodes=nodes_of(seen, blamed),
        rule=rule,
        confidence=verdict.confidence,
        reasons=verdict.reasons,
        summary=incident.summary,
        gather_until=None,
        tier=tier,
    )


def kept(spec: Spec, seen: Observation, record: IncidentRecord) -> tuple[IncidentRecord, tuple[KeepEvidence, ...]]:
    """The record with the address of its dossier, and what writes that: nothing goes under a prefix of another run."""
    if not seen.store.listed or seen.store.problem_reason == "PrefixOwned":
        return record, ()
    key = incident_key(record.attempt, record.id, seen.uid)
    record = replace(record, evidence_uri=f"{spec.checkpoint.uri.rstrip('/')}/{key}")
    return record, (KeepEvidence(key=key, record=record),)


def recorded(status: RunStatus, record: IncidentRecord) -> RunStatus:
    """The status with this record put in place of the one of its id, or added."""
    if any(each.id == record.id for each in status.incidents):
        incidents = tuple(record if each.id == record.id else each for each in status.incidents)
    else:
        incidents = (*status.incidents, record)
    return replace(status, incidents=incidents[-MAX_INCIDENTS:])


def under_inquiry(status: RunStatus) -> IncidentRecord | None:
    """The incident of this attempt for which evidence is awaited."""
    record = status.open_incident
    awaited = record is not None and record.attempt == status.attempt and record.gather_until is not None
    return record if awaited else None


def closed(status: RunStatus, step_seconds: float, now: float) -> RunStatus:
    """The run is back from all that is open: note when, from where, and what it cost.

    The first of several open incidents cost the steps; those after it only broke its recovery.
    """
    from_step = status.restored_step if status.restored_step is not None else -1
    waiting = [each for each in status.incidents if each.is_open]
    if not waiting:
        return status
    lost = max(0, waiting[0].step - from_step)
    for each in waiting:
        mine = lost if each is waiting[0] else 0
        back = replace(
            each,
            recovered_at=now,
            restored_step=from_step,
            origin=status.origin,
            steps_lost=mine,
            gather_until=None,
        )
        status = recorded(status, back)
    return replace(status, ledger=book_lost_steps(status.ledger, lost, step_seconds))


def event_reason(record: IncidentRecord) -> str:
    """CamelCase word for Kubernetes Events: RankCrashed, RankHung, Lost, ..."""
    about_rank = record.kind in (IncidentKind.CRASHED, IncidentKind.HUNG)
    return f"Rank{record.kind.capitalize()}" if about_rank else record.kind.capitalize()


def last_words(seen: Observation, incident: Incident) -> str:
    """The culprit's traceback, or the last lines it printed, or why its container never ran."""
    for rank in seen.ranks:
        if rank.rank in incident.verdict.ranks:
            if rank.error is not None and rank.error.traceback:
                return rank.error.traceback[-LAST_WORDS_CHARACTERS:]
            if rank.exit is not None and rank.exit.log_tail:
                return "\n".join(rank.exit.log_tail)[-LAST_WORDS_CHARACTERS:]
    for pod in seen.pods:
        if pod.index in incident.workers and (pod.log_tail or pod.message):
            return ("\n".join(pod.log_tail) or pod.message)[-LAST_WORDS_CHARACTERS:]
    return ""
