"""Where the seconds of a recovery go: its parts by way back and peer, as a table and as a picture.

    python benchmarks/anatomy.py [--quick] [--json FILE] [--picture FILE]

Two ranks; medians. Ours are runs on the local cluster: noticing and deciding are in the run's status, the ends of
processes are watched by the kernel's word, and the ranks mark their own way to the first step. A peer's noticing is the
first line of its log about it; it decides at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import marks
from episodes import Deaths, Episode, Harm, a_hospital
from figures import Row, parser, publish, row
from launched import Launched, Launcher, NeverTrained, injured, launched, nvrx, torchrun
from marks import PARTS
from peers import PeerUnavailable
from recovery import TRAINER, Course
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "recovery-anatomy.png"
RANKS = 2
CLOSER = 0.4  # of the longest: what is shorter is drawn once more on a scale of its own
# A sequence that stays apart for colour-blind eyes (Okabe and Ito), from noticing to the first step.
COLOURS = ("#D55E00", "#E69F00", "#999999", "#F0E442", "#0072B2", "#56B4E9", "#009E73", "#CC79A7")
NAMES = {
    "rejoin": "mend, rejoin",
    "restart": "mend, restart-ranks",
    "cold": "mend, restart-ranks, cold",
    "hang": "mend, SIGSTOP, rejoin",
}


def main() -> int:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE", help="the picture to draw")
    chosen = options.parse_args()
    found = asyncio.run(measure(chosen))
    middle = {way: medians(each) for way, each in found.items() if each}
    draw(middle, {way: len(each) for way, each in found.items()}, chosen.picture)
    more = {"parts": middle, "picture": os.path.relpath(chosen.picture, ROOT / "docs")}
    return publish("Anatomy of a recovery, 2 ranks", rows(found), chosen, more)


def medians(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each part; a picture of medians, not a median recovery."""
    return {part: round(median(each[part] for each in episodes), 4) for part in PARTS}


def rows(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """The whole of each way of mend's, by the marks: what the status says without the controller's own delay."""
    targets = {NAMES["rejoin"]: 0.5, NAMES["restart"]: 0.8, NAMES["hang"]: 1.5}
    return [
        row(
            f"{way}: fault to first new step, by the ranks' own marks",
            [sum(one.values()) for one in each],
            targets[way],
        )
        for way, each in found.items()
        if way in targets
    ]


async def measure(options: Namespace) -> dict[str, list[dict[str, float]]]:
    """The parts of every recovery by its way."""
    times = 2 if options.quick else 10
    with tempfile.TemporaryDirectory(prefix="mb-") as folder, Progress(console=Console(stderr=True)) as bar:
        scratch = Path(folder)
        found = await _ours(scratch, times, bar)
        for make in (torchrun, nvrx):
            found.update(await _peer(make, scratch, times, bar))
    return found


async def _ours(scratch: Path, times: int, bar: Progress) -> dict[str, list[dict[str, float]]]:
    file = scratch / "marks"
    restarts = [Harm.KILL] * times + [Harm.KILL_COLD] * times
    courses = (
        Course("rejoin", RANKS, [Harm.KILL] * times + [Harm.STOP] * times),
        Course("restart", RANKS, restarts, first_tier="restart-ranks"),
    )
    task = bar.add_task("mend", total=4 * times)
    episodes: list[Episode] = []
    async with a_hospital(scratch, {marks.ENV: str(file)}) as hospital:
        for course in courses:
            async with hospital.run(course.name, course.spec) as patient:
                episodes += await patient.episodes(course.harms, partial(bar.advance, task))
    written = marks.read(file)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES.values()}
    for each in episodes:
        before = each.incident.recovered_at
        told = [mark for mark in written if before is None or mark.at < before + 1.0]
        parts = marks.parts(each.at, each.incident.detected_at, each.decided, each.deaths, told)
        if parts is not None:
            found[NAMES[_way(each)]].append(parts)
    return found


def _way(episode: Episode) -> str:
    if episode.harm is Harm.KILL_COLD:
        return "cold"
    if episode.harm is Harm.STOP:
        return "hang"
    return "rejoin" if episode.incident.tier == "rejoin" else "restart"


async def _peer(
    make: Callable[[], Launcher], scratch: Path, times: int, bar: Progress
) -> dict[str, list[dict[str, float]]]:
    """Kills alone: a peer's hangs differ only in what noticing takes."""
    try:
        launcher = await asyncio.to_thread(make)
    except PeerUnavailable as why:
        Console(stderr=True).print(f"{make.__name__}: {why}")
        return {}
    file = scratch / f"marks-{launcher.name}"
    os.environ[marks.ENV] = str(file)
    task = bar.add_task(launcher.name, total=times)
    found = []
    try:
        async with launched(launcher, scratch, [*TRAINER, "--set", f"data.cache={scratch}/data"], RANKS) as run:
            for _ in range(times):
                parts = await _parts_of_peer(run, file)
                found += [] if parts is None else [parts]
                bar.advance(task)
    except NeverTrained as why:
        Console(stderr=True).print(f"{launcher.name}: {why}")
    return {launcher.name: found}


async def _parts_of_peer(run: Launched, file: Path) -> dict[str, float] | None:
    """Of one recovery from a kill; None if it did not come back, or its marks are not complete."""
    await run.steady()
    deaths = Deaths(run.pids.values())
    hurt = await injured(run, signal.SIGKILL, 60.0)
    ended = deaths.close()
    if hurt.noticed is None or hurt.back is None:
        return None
    noticed = hurt.at + hurt.noticed
    told = [each for each in marks.read(file) if each.at < hurt.at + hurt.back + 1.0]
    return marks.parts(hurt.at, noticed, noticed, ended, told)


# ---------------------------------------------------------------- drawing
def draw(parts: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], path: Path) -> None:
    """Stacked bars, one a way, with what each part takes where there is room; the short ones once more, closer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    totals = {way: sum(each.values()) for way, each in parts.items()}
    short = [way for way, total in totals.items() if total < CLOSER * max(totals.values())]
    panels = [[*parts], short] if short else [[*parts]]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(10, 0.5 * sum(map(len, panels)) + 1.4 * len(panels)),
        layout="constrained",
        squeeze=False,
        height_ratios=[len(ways) + 1 for ways in panels],
    )
    for axis, ways in zip(axes[:, 0], panels, strict=True):
        _panel(axis, {way: parts[way] for way in ways}, counts)
    axes[-1, 0].set_xlabel("seconds from the fault to the first new step of all ranks (medians of each part)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    figure.legend(handles, PARTS, loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, parts: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> None:
    longest = max((sum(each.values()) for each in parts.values()), default=1.0)
    for place, each in enumerate(parts.values()):
        _bar(axes, place, each, longest)
    axes.set_yticks(range(len(parts)), [f"{way} (n={counts[way]})" for way in parts])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.09)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Any, place: int, parts: Mapping[str, float], longest: float) -> None:
    left = 0.0
    for part, colour in zip(PARTS, COLOURS, strict=True):
        seconds = parts[part]
        axes.barh(place, seconds, left=left, color=colour, height=0.7)
        if seconds > 0.035 * longest:
            dark = colour in ("#0072B2", "#D55E00")
            ink = "white" if dark else "black"
            axes.text(left + seconds / 2, place, f"{seconds:.2f}", ha="center", va="center", fontsize=8, color=ink)
        left += seconds
    axes.text(left + 0.008 * longest, place, f"{left:.2f} s", va="center", fontsize=9, fontweight="bold")


if __name__ == "__main__":
    raise SystemExit(main())
