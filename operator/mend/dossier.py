"""Pure: an incident's dossier: its record and all that was seen when it was judged, bounded, as the store keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from mend.evidence import RankEvidence
from mend.facts import Fact
from mend.heartbeats import RankReport
from mend.incidents import IncidentRecord
from mend.observation import Observation, WorkerPod

MOST_BYTES = 1 << 20  # a hundred of them are kept; stacks of a thousand ranks would be more than anybody reads


class Dossier(Fact, frozen=True, kw_only=True):
    """Everything about one incident. `shortened` says that stacks and log lines of ranks not blamed were cut."""

    run: str  # namespace/name
    run_uid: str
    incident: IncidentRecord
    ranks: tuple[RankReport, ...] = ()
    evidence: tuple[RankEvidence, ...] = ()
    workers: tuple[WorkerPod, ...] = ()
    shortened: bool = False


class UnreadableDossier(ValueError):
    """These bytes are no dossier."""


class _Allowance(NamedTuple):
    """What is kept of a rank that is not blamed."""

    stack_characters: int
    log_lines: int


_ALLOWANCES = (_Allowance(4096, 20), _Allowance(1024, 3), _Allowance(0, 0))


def compose(seen: Observation, record: IncidentRecord) -> Dossier:
    """The dossier of an incident that was judged on this observation."""
    return Dossier(
        run=f"{seen.namespace}/{seen.name}",
        run_uid=seen.uid,
        incident=record,
        ranks=seen.ranks,
        evidence=tuple(rank for each in seen.evidence if each.attempt == record.attempt for rank in each.ranks),
        workers=tuple(pod for pod in seen.pods if pod.index in seen.status.participants),
    )


def encode(dossier: Dossier, most_bytes: int = MOST_BYTES) -> bytes:
    """The dossier as JSON of at most `most_bytes`: what is said of the blamed goes last."""
    versions = (msgspec.json.encode(each) for each in _ever_shorter(dossier))
    return next(raw for raw in versions if len(raw) <= most_bytes)


def decode(raw: bytes) -> Dossier:
    """The dossier in these bytes; raises `UnreadableDossier`."""
    try:
        return msgspec.json.decode(raw, type=Dossier)
    except msgspec.MsgspecError as error:
        raise UnreadableDossier(f"no dossier of mend's: {error}") from error


def _ever_shorter(dossier: Dossier) -> Iterator[Dossier]:
    yield dossier
    for allowance in _ALLOWANCES:
        yield _shortened(dossier, allowance, spared=dossier.incident.culprit_ranks)
    blamed = dossier.incident.culprit_ranks[:8]
    few = replace(
        dossier,
        ranks=tuple(rank for rank in dossier.ranks if rank.rank in blamed),
        evidence=tuple(rank for rank in dossier.evidence if rank.rank in blamed),
        workers=(),
    )
    for allowance in _ALLOWANCES:
        yield _shortened(few, allowance, spared=())
    yield replace(few, ranks=(), evidence=(), shortened=True)


def _shortened(dossier: Dossier, allowance: _Allowance, spared: tuple[int, ...]) -> Dossier:
    characters, lines = allowance

    def evidence(rank: RankEvidence) -> RankEvidence:
        return replace(rank, stack=_end(rank.stack, characters), log_tail=_last(rank.log_tail, lines))

    def report(rank: RankReport) -> RankReport:
        cut = rank.exit and replace(rank.exit, log_tail=_last(rank.exit.log_tail, lines))
        told = rank.error and replace(
            rank.error,
            message=rank.error.message[:characters],
            traceback=_end(rank.error.traceback, characters),
        )
        return replace(rank, exit=cut, error=told)

    return replace(
        dossier,
        ranks=tuple(rank if rank.rank in spared else report(rank) for rank in dossier.ranks),
        evidence=tuple(rank if rank.rank in spared else evidence(rank) for rank in dossier.evidence),
        shortened=True,
    )


def _end(text: str, characters: int) -> str:
    """faulthandler prints the main thread last, and a traceback its cause."""
    return text[-characters:] if characters else ""


def _last(lines: tuple[str, ...], count: int) -> tuple[str, ...]:
    return lines[-count:] if count else ()
