"""The picture of a run: its loss over steps with one colour per attempt, and a mark at every incident."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mend.heartbeats import LOSS
from mend.incidents import IncidentRecord
from mend.journal import CurvePoint

# Okabe and Ito's palette, which people with colour-blind eyes can tell apart; black is kept for marks.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GAP = 0.04


def draw_run(
    points: Iterable[CurvePoint],
    incidents: Sequence[IncidentRecord],
    title: str,
    path: Path,
    unbroken: Iterable[CurvePoint] = (),
) -> None:
    """Write a PNG of the loss curve; `unbroken` is drawn beneath it as a pale band, to compare with."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5.5), dpi=130, layout="constrained")
    calm = [(each.point.step, each.point.loss) for each in unbroken if each.point.name == LOSS]
    if calm:
        axes.plot(*zip(*calm, strict=True), color="#d9d9d9", linewidth=7, solid_capstyle="round", label="unbroken run")
    curves = by_attempt(points)
    for number, (attempt, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.8, label=f"attempt {attempt}")
        axes.plot(*curve[0], marker="o", markersize=5, color=colour)
    top = axes.get_ylim()[1]
    for place, incident in enumerate(incidents):
        axes.axvline(incident.step, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            _said(incident),
            (incident.step, top * (1 - GAP - 0.13 * (place % 3))),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=8.5,
            va="top",
            bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "#999999", "alpha": 0.9},
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if curves or calm:
        axes.legend(frameon=False, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def by_attempt(points: Iterable[CurvePoint]) -> dict[int, list[tuple[int, float]]]:
    """(step, loss) of each attempt, in order; points without a finite loss are left out."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for each in points:
        if each.point.name == LOSS and each.point.loss is not None:
            curves.setdefault(each.attempt, []).append((each.point.step, each.point.loss))
    return {attempt: sorted(curve) for attempt, curve in sorted(curves.items())}


def _said(incident: IncidentRecord) -> str:
    who = ", ".join(f"rank {rank}" for rank in incident.culprit_ranks) or "culprit unknown"
    back = "" if incident.recovered_at is None else f"\nback after {incident.recovered_at - incident.began_at:.1f} s"
    return f"{incident.kind}: {who}\n{incident.tier or 'went on by itself'}{back}"
