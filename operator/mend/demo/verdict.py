"""Pure: what the demonstration has shown, as a table and as facts for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from mend.demo.watch import Injection, Plan
from mend.heartbeats import LOSS
from mend.incidents import IncidentRecord
from mend.journal import CurvePoint
from mend.manifest import Manifest
from mend.status import RunStatus


@dataclass(frozen=True, slots=True)
class Shown:
    """One incident as the summary tells it; `injected_rank` is None for one that nobody injected."""

    kind: str
    injected_rank: int | None
    culprit_ranks: tuple[int, ...]
    detect_seconds: float
    recover_seconds: float | None
    steps_lost: int | None
    tier: str | None
    evidence: str


def matched(incidents: Iterable[IncidentRecord], injections: Sequence[Injection]) -> list[Shown]:
    """Every incident with the injection that caused it, if any: the last of its kind before it was noticed."""
    left = list(injections)
    shown = []
    for incident in incidents:
        fitting = [
            each for each in left if each.harm.shows_as is incident.kind and each.at <= incident.detected_at + 0.01
        ]
        cause = fitting[-1] if fitting else None
        if cause is not None:
            left.remove(cause)
        began = cause.at if cause is not None else incident.began_at
        shown.append(
            Shown(
                kind=str(incident.kind),
                injected_rank=cause.rank if cause else None,
                culprit_ranks=incident.culprit_ranks,
                detect_seconds=round(max(0.0, incident.detected_at - began), 3),
                recover_seconds=None if incident.recovered_at is None else round(incident.recovered_at - began, 3),
                steps_lost=incident.steps_lost,
                tier=str(incident.tier) if incident.tier else None,
                evidence=incident.summary,
            )
        )
    return shown


def curves_agree(points: Iterable[CurvePoint], unbroken: Iterable[CurvePoint], steps: int) -> tuple[int, list[int]]:
    """(steps compared, steps at which any attempt's loss differs in any bit from the unbroken run's)."""
    calm, broken = _losses(unbroken), _losses(points)
    different = [step for step in range(steps) if len(calm.get(step, ())) != 1 or broken.get(step) != calm[step]]
    return len(calm.keys() & broken.keys()), different


def weights_agree(one: Manifest, other: Manifest) -> bool:
    """Whether two checkpoints hold the same bytes in every tensor, by their digests."""
    return _digests(one) == _digests(other)


def broken_promises(
    planned: Sequence[Plan],
    injections: Sequence[Injection],
    shown: Sequence[Shown],
    different: Sequence[int],
    last: tuple[Manifest, Manifest],
) -> list[str]:
    """What the demonstration promised and did not show. Harm that was never done proves nothing, so it is one too.

    `different` are the steps whose losses differ, `last` the manifests of the last checkpoints.
    """
    failures = [
        f"the {plan.harm} of rank {plan.rank} after step {plan.step} was not done: the run ended before"
        for plan in planned[len(injections) :]
    ]
    for injection in injections:
        mine = [each for each in shown if each.injected_rank == injection.rank and each.kind == injection.harm.shows_as]
        if not mine:
            failures.append(f"the {injection.harm} of rank {injection.rank} was not noticed")
        elif mine[0].culprit_ranks != (injection.rank,):
            failures.append(f"rank {injection.rank} was harmed, but blamed was {mine[0].culprit_ranks or 'nobody'}")
    if different:
        failures.append(f"the loss differs at {len(different)} steps, first at step {different[0]}")
    if not weights_agree(*last):
        failures.append(f"the weights in the last checkpoints (of steps {last[0].step} and {last[1].step}) differ")
    return failures


def summary(status: RunStatus, shown: Sequence[Shown], *, bit_exact: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of demo/summary.json."""
    return {
        "incidents": [asdict(each) for each in shown],
        "attempts": status.attempt,
        "final_step": status.step,
        "bit_exact": bit_exact,
        **more,
    }


def table(shown: Sequence[Shown]) -> Table:
    """The incidents for people; fits a terminal of 80 columns."""
    view = Table(title="What happened to the run", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("incident", no_wrap=True)
    view.add_column("culprit", no_wrap=True)
    view.add_column("evidence", overflow="fold")
    for heading in ("noticed", "back", "lost"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("tier", no_wrap=True)
    for each in shown:
        view.add_row(
            each.kind,
            ", ".join(f"rank {rank}" for rank in each.culprit_ranks) or "unknown",
            each.evidence if each.injected_rank is not None else f"{each.evidence} (not injected)",
            f"{each.detect_seconds:.2f} s",
            "-" if each.recover_seconds is None else f"{each.recover_seconds:.2f} s",
            "-" if each.steps_lost is None else f"{each.steps_lost} st.",
            each.tier or "-",
        )
    return view


def _losses(points: Iterable[CurvePoint]) -> dict[int, set[float]]:
    """Every loss that any attempt reported for a step."""
    losses: dict[int, set[float]] = defaultdict(set)
    for each in points:
        if each.point.name == LOSS and each.point.loss is not None:
            losses[each.point.step].add(each.point.loss)
    return losses


def _digests(manifest: Manifest) -> dict[tuple[str, tuple[int, ...]], str]:
    return {(name, chunk.offsets): chunk.digest for name, entry in manifest.tensors.items() for chunk in entry.chunks}
