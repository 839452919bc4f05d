"""Pure: a run told to a person, from its status: what was seen, who is blamed and why, what was done, what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import assert_never

from mend.incidents import IncidentRecord, Origin, Tier
from mend.status import RunStatus


def tell(name: str, status: RunStatus) -> Iterator[str]:
    """The whole story, a line at a time."""
    yield headline(name, status)
    for condition in status.conditions:
        if condition.type in ("Accepted", "StorageReady") and condition.status == "False":
            yield f"  ! {condition.type}: {condition.reason}: {condition.message}"
        if condition.type == "Failed":
            yield f"  ! {condition.reason}: {condition.message}"
    if not status.incidents:
        yield "  No incident so far."
    for incident in status.incidents:
        yield ""
        yield from tell_incident(incident)
    if status.started_at is not None:
        yield ""
        yield from tell_ledger(status)


def headline(name: str, status: RunStatus) -> str:
    """One line: where the run is."""
    parts = [f"{name}: {status.phase}", f"attempt {status.attempt}", f"step {status.step}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.checkpoint is not None:
        word = "verified" if status.checkpoint.verified else "committed"
        parts.append(f"checkpoint of step {status.checkpoint.step} ({word})")
    return ", ".join(parts)


def tell_incident(incident: IncidentRecord) -> Iterator[str]:
    """One incident as a paragraph."""
    yield (
        f"  {incident.id}. {_clock(incident.detected_at)}  {incident.kind} in attempt {incident.attempt} "
        f"after step {incident.step}: {incident.summary}"
    )
    yield f"     noticed  {incident.detected_at - incident.began_at:.2f} s after it began"
    yield f"     blamed   {culprits(incident)}"
    for reason in incident.reasons:
        yield f"              - {reason}"
    yield f"     done     {_done(incident)}"
    yield f"     cost     {_cost(incident)}"
    if incident.evidence_uri:
        yield f"     evidence {incident.evidence_uri}"


def culprits(incident: IncidentRecord) -> str:
    """Who is blamed, in words; 'nobody' when the evidence does not say."""
    if not incident.culprit_ranks:
        return "nobody: the evidence does not say"
    ranks = ", ".join(str(rank) for rank in incident.culprit_ranks)
    workers = ", ".join(str(worker) for worker in incident.culprit_workers)
    noun = "rank" if len(incident.culprit_ranks) == 1 else "ranks"
    return f"{noun} {ranks}" + (f" on worker {workers}" if workers else "") + f", {incident.confidence:.0%} sure"


def tell_ledger(status: RunStatus) -> Iterator[str]:
    """Where the seconds went."""
    ledger = status.ledger
    entries = {
        "productive": ledger.productive,
        "starting": ledger.starting,
        "waiting for workers": ledger.pending,
        "before faults were noticed": ledger.detecting,
        "recovering": ledger.recovering,
        "steps done twice": ledger.lost,
        "suspended": ledger.suspended,
    }
    yield f"  Goodput {ledger.goodput:.1%}; the time went into:"
    for words, seconds in entries.items():
        if seconds >= 0.05:
            yield f"     {seconds:10.1f} s  {words}"


def _done(incident: IncidentRecord) -> str:
    match incident.tier:
        case None if incident.is_open:
            return "evidence is being gathered"
        case None:
            return "nothing: it went on by itself"
        case Tier.GIVE_UP:
            return "gave up"
        case tier:
            where = "" if incident.restored_step is None else ", " + start(incident.restored_step, incident.origin)
            return f"{tier}{where}"


def start(step: int, origin: Origin | None) -> str:
    """What an attempt began with, in words."""
    if step < 0:
        return "from scratch"
    match origin:
        case Origin.RANKS:
            return f"from step {step} in the memory of its peers"
        case Origin.MEMORY:
            return f"from the snapshot of step {step} in its workers' own memory"
        case Origin.PEER:
            return f"from the snapshot of step {step}, with copies that a buddy kept"
        case Origin.STORE | None:
            return f"from the checkpoint of step {step}"
        case never:
            assert_never(never)


def _cost(incident: IncidentRecord) -> str:
    if incident.recovered_at is None:
        return "not known yet" if incident.tier is not Tier.GIVE_UP else "the run"
    seconds = incident.recovered_at - incident.began_at
    return f"{seconds:.2f} s from the fault to the first new step, {incident.steps_lost or 0} steps lost"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
