"""Pure: which of the user's rules an incident answers to: the first, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mend.culprit import signal_name
from mend.heartbeats import RankReport
from mend.incidents import Incident
from mend.observation import Observation, WorkerPod
from mend.patterns import is_in
from mend.presence import workers_of
from mend.ruleset import NodeCondition, Rule
from mend.spec import Spec

MAX_LINES = 200
MAX_CHARACTERS = 1000  # of one line


@dataclass(frozen=True, slots=True)
class Symptoms:
    """What rules look at: of the culprits where some are named, else of every rank and worker that is affected."""

    exit_codes: frozenset[int]
    reasons: frozenset[str]
    node_conditions: frozenset[str]  # "Type=Status"
    lines: tuple[str, ...]


def rule_for(spec: Spec, seen: Observation, incident: Incident) -> Rule | None:
    """The first rule that the incident answers to."""
    rules = spec.recovery.rules
    if not rules:
        return None
    symptoms = symptoms_of(spec, seen, incident)
    return next((rule for rule in rules if answers(rule, symptoms)), None)


def answers(rule: Rule, symptoms: Symptoms) -> bool:
    """Whether everything that the rule asks for is there."""
    asked = (
        rule.exit_codes is None or _exited_so(rule, symptoms),
        not rule.reasons or not symptoms.reasons.isdisjoint(rule.reasons),
        not rule.node_conditions or any(_holds(each, symptoms) for each in rule.node_conditions),
        rule.log_pattern is None or any(is_in(rule.log_pattern, line) for line in symptoms.lines),
    )
    return all(asked)


def _exited_so(rule: Rule, symptoms: Symptoms) -> bool:
    codes = rule.exit_codes
    assert codes is not None
    return any((code in codes.values) == codes.is_in for code in symptoms.exit_codes)


def _holds(condition: NodeCondition, symptoms: Symptoms) -> bool:
    return f"{condition.type}={condition.status}" in symptoms.node_conditions


# ---------------------------------------------------------------- what there is to see
def symptoms_of(spec: Spec, seen: Observation, incident: Incident) -> Symptoms:
    """Exit codes, reasons, node conditions and last lines of those to blame, or else of all that are affected."""
    numbers = incident.verdict.ranks or incident.ranks
    ranks = [rank for rank in seen.ranks if rank.rank in numbers]
    workers = set(incident.workers) | set(workers_of(spec, seen, numbers))
    pods = [pod for worker in sorted(workers) if (pod := seen.pod_of(worker)) is not None]
    return Symptoms(
        exit_codes=frozenset(_exit_codes(ranks, pods)),
        reasons=frozenset({str(incident.kind), *_reasons(ranks, pods)}),
        node_conditions=frozenset(each for pod in pods for each in pod.node_conditions),
        lines=tuple(line[:MAX_CHARACTERS] for line in _lines(ranks, pods))[-MAX_LINES:],
    )


def _exit_codes(ranks: Sequence[RankReport], pods: Sequence[WorkerPod]) -> Iterator[int]:
    """Of failures only: who was killed by a signal has exited with 128 and its number, as shells have it."""
    for rank in ranks:
        if rank.exit is not None:
            code = rank.exit.code if rank.exit.signal is None else 128 + rank.exit.signal
            yield from (code,) if code else ()
    yield from (pod.exit_code for pod in pods if pod.exit_code)


def _reasons(ranks: Sequence[RankReport], pods: Sequence[WorkerPod]) -> Iterator[str]:
    """Words of Kubernetes for pods; of ranks, the type of the exception, the name of the signal, or OOMKilled."""
    yield from (pod.reason for pod in pods if pod.reason)
    for rank in ranks:
        if rank.error is not None:
            yield rank.error.type
        if rank.exit is not None and rank.exit.oom_killed:
            yield "OOMKilled"
        if rank.exit is not None and rank.exit.signal is not None:
            yield signal_name(rank.exit.signal)


def _lines(ranks: Sequence[RankReport], pods: Sequence[WorkerPod]) -> Iterator[str]:
    for pod in pods:
        yield from pod.log_tail
    for rank in ranks:
        yield from rank.exit.log_tail if rank.exit is not None else ()
        if rank.error is not None:
            yield from rank.error.traceback.splitlines()
            yield from f"{rank.error.type}: {rank.error.message}".splitlines()
