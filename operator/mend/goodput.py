"""Pure: the ledger of seconds, where a run's time went."""

from __future__ import annotations

from msgspec.structs import replace

from mend.incidents import IncidentRecord
from mend.status import Ledger, RunPhase, RunStatus


def account(status: RunStatus, now: float) -> RunStatus:
    """Book the seconds since the last booking on what the run was doing; a clock set back books nothing."""
    since = status.accounted_at
    if since is None or status.phase.is_final:
        return replace(status, accounted_at=now)
    entry = _entry(status)
    seconds = max(0.0, now - since)
    ledger = replace(status.ledger, **{entry: getattr(status.ledger, entry) + seconds})
    return replace(status, ledger=_with_goodput(ledger), accounted_at=now)


def suspended_seconds(status: RunStatus, now: float) -> float:
    """How long the run has been suspended, all told, up to now."""
    unbooked = status.phase is RunPhase.SUSPENDED and status.accounted_at is not None
    return status.ledger.suspended + (max(0.0, now - (status.accounted_at or now)) if unbooked else 0.0)


def book_detection(ledger: Ledger, incident: IncidentRecord) -> Ledger:
    """The seconds between the fault and its detection looked productive but were not."""
    return _moved(ledger, "productive", "detecting", incident.detected_at - incident.began_at)


def book_lost_steps(ledger: Ledger, steps: int, step_seconds: float) -> Ledger:
    """Steps that have to be done again were not productive after all."""
    return _moved(ledger, "productive", "lost", steps * step_seconds)


def _entry(status: RunStatus) -> str:
    match status.phase:
        case RunPhase.PENDING:
            return "starting" if status.participants else "pending"
        case RunPhase.SUSPENDED:
            return "suspended"
        case RunPhase.RECOVERING:
            return "recovering"
        case _:
            return "productive"


def _moved(ledger: Ledger, source: str, target: str, seconds: float) -> Ledger:
    amount = min(max(0.0, seconds), getattr(ledger, source))
    moved = {source: getattr(ledger, source) - amount, target: getattr(ledger, target) + amount}
    return _with_goodput(replace(ledger, **moved))


def _with_goodput(ledger: Ledger) -> Ledger:
    spent = ledger.pending + ledger.starting + ledger.productive + ledger.lost + ledger.detecting + ledger.recovering
    return replace(ledger, goodput=round(ledger.productive / spent, 4) if spent else 0.0)
