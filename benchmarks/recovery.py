"""Seconds from a fault to the first new step of all ranks, by every way back, beside torchrun, NVRx and Ray Train.

    python benchmarks/recovery.py [--quick] [--json FILE]

Runs of the reference trainer on the local cluster, with a checkpoint to S3 every 5 steps, are hurt again and again;
times are those of the run's status. The same trainer, model and faults under each peer, right after.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from episodes import HANGS, Episode, Harm, a_hospital
from figures import Peer, Row, arguments, not_built, publish, row
from launched import Launcher, NeverTrained, injured, launched, nvrx, ray_train, torchrun
from peers import PeerUnavailable
from rich.console import Console
from rich.progress import Progress
from with_tests import build_gil_holder

from mend.spec import Workers

TRAINER = ["--set", "steps=1000000", "--set", "log_every_seconds=0"]
REJOIN = {2: 0.5, 4: 0.8}
RESTART = {2: 0.8, 4: 1.2}
SPARE, NEW_POD = 2.0, 5.0
HANG_SECONDS = 1.0  # what noticing may take, on top of the way back
COLD_SLACK = 1.1
PEERS: tuple[tuple[str, Callable[[], Launcher]], ...] = (
    ("torchrun", torchrun),
    ("NVRx", nvrx),
    ("Ray Train", ray_train),
)
HAS_SPARES = "spares" in Workers.__struct_fields__


@dataclass(frozen=True, slots=True)
class Course:
    """A run and what is done to it."""

    name: str
    ranks: int
    harms: Sequence[Harm]
    first_tier: str = "rejoin"
    spares: int = 0

    @property
    def spec(self) -> dict[str, Any]:
        """Two workers, as everywhere; that one rank is hurt again and again is no reason here to check its node."""
        workers = {"replicas": 2, "ranksPerWorker": self.ranks // 2}
        if self.spares:
            workers["spares"] = self.spares
        return {"workers": workers, "recovery": {"firstTier": self.first_tier, "nodeCheck": "Never"}}


@dataclass(slots=True)
class PeerTimes:
    """Seconds to the first new step by ranks; `why` nothing of a peer was measured, or not for other numbers."""

    kills: dict[int, list[float]] = field(default_factory=dict)
    hang: float | None = None
    why: str = ""

    def killed(self, ranks: int) -> Peer:
        """The median after a kill."""
        if ranks not in self.kills:
            return self.why
        return round(median(self.kills[ranks]), 3) if self.kills[ranks] else None

    @property
    def hung(self) -> Peer:
        """After a SIGSTOP; None if it did not come back."""
        return self.hang if self.kills else self.why


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Recovery", asyncio.run(measure(options)), options)


def courses(quick: bool) -> list[Course]:
    """All runs."""
    many, some, few = (2, 1, 1) if quick else (10, 5, 3)
    found = [
        Course("rejoin-2", 2, [Harm.KILL] * many),
        # A run each: mend waits twice as long for the second hang of a day, if it may yet turn out to be a pause.
        *(Course(f"hang-2-{number}", 2, [harm]) for number, harm in enumerate([*HANGS] * few)),
        Course("restart-2", 2, [Harm.KILL] * many + [Harm.KILL_COLD] * few, first_tier="restart-ranks"),
        Course("rejoin-4", 4, [Harm.KILL] * some),
        Course("restart-4", 4, [Harm.KILL] * some, first_tier="restart-ranks"),
        Course("new-pod", 2, [Harm.KILL_AGENT] * few),
    ]
    return [*found, Course("spare", 2, [Harm.KILL_AGENT] * few, spares=1)] if HAS_SPARES else found


async def measure(options: Namespace) -> list[Row]:
    """All rows."""
    patience, times = (20.0, 1) if options.quick else (60.0, 3)
    with tempfile.TemporaryDirectory(prefix="mb-") as folder, Progress(console=Console(stderr=True)) as bar:
        scratch = Path(folder)
        imports = await asyncio.to_thread(_import_seconds, 2)
        ours = await _measure_mend(scratch, courses(options.quick), bar)
        theirs = {}
        for name, make in PEERS:
            if options.quick and name == "Ray Train":  # half a minute until it trains
                theirs[name] = PeerTimes(why="not with --quick")
            else:
                sizes = (2,) if options.quick else (2, 4)
                theirs[name] = await _measure_peer(make, scratch, sizes, times, patience, bar)
    return rows(ours, theirs, imports, patience)


def rows(ours: dict[str, list[Episode]], theirs: dict[str, PeerTimes], imports: float, patience: float) -> list[Row]:
    """Episodes and peers' times, as figures."""
    limit = f"not in {patience:.0f} s"
    killed = {size: {name: each.killed(size) for name, each in theirs.items()} for size in (2, 4)}
    hung = {name: each.hung for name, each in theirs.items()}
    found = []
    for way, targets in (("rejoin", REJOIN), ("restart", RESTART)):
        for size, target in targets.items():
            done = [each for each in ours[f"{way}-{size}"] if each.harm is Harm.KILL]
            words = {"rejoin": "rejoin", "restart": "restart-ranks with standbys"}[way]
            what = f"SIGKILL -> first new step, {size} ranks, {words}"
            found.append(_of(what, done, target, peers=killed[size], limit=limit))
    for harm in HANGS:
        done = [each for name, found in ours.items() if name.startswith("hang-") for each in found if each.harm is harm]
        target = HANG_SECONDS + REJOIN[2]
        found.append(_of(f"{harm} -> first new step, 2 ranks, rejoin", done, target, peers=hung, limit=limit))
    found.append(_cold(ours["restart-2"], imports))
    found.append(_of("worker lost -> first new step, by a new pod", ours["new-pod"], NEW_POD))
    if HAS_SPARES:
        found.append(_of("worker lost -> first new step, by a spare", ours["spare"], SPARE))
    else:
        found.append(not_built("worker lost -> first new step, by a spare", SPARE, what="spec.workers.spares"))
    everything = [each for course in ours.values() for each in course]
    noticed = [1000 * each.detected for each in everything if each.harm is Harm.KILL]
    found.append(row("SIGKILL -> incident in the run's status, whole cluster", noticed, 20.0, unit="ms"))
    return found


def _of(what: str, episodes: Sequence[Episode], target: float, **more: Any) -> Row:
    """The row of these episodes; ways back that were not the expected ones are said."""
    tiers = sorted({str(each.incident.tier) for each in episodes})
    wrong = sum(each.harm is not Harm.KILL_AGENT and each.incident.culprit_ranks != (each.rank,) for each in episodes)
    note = f"by {', '.join(tiers)}" + (f"; {wrong} of {len(episodes)} blamed on others" if wrong else "")
    return row(what, [each.recovered for each in episodes], target, note=note, **more)


def _cold(episodes: Sequence[Episode], imports: float) -> Row:
    """Cold may cost what warm costs, and the imports that standbys save, measured by themselves."""
    what = "SIGKILL -> first new step, 2 ranks, cold"
    warm = [each.recovered for each in episodes if each.harm is Harm.KILL]
    cold = [each.recovered for each in episodes if each.harm is Harm.KILL_COLD]
    if not warm:
        return row(what, [], 0.0, note="not measured: nor was warm")
    parts = f"warm {median(warm):.2f} s, imports of 2 ranks at once {imports:.2f} s, and 10%"
    return row(what, cold, round(COLD_SLACK * (median(warm) + imports), 3), note=parts)


# ---------------------------------------------------------------- doing
async def _measure_mend(scratch: Path, todo: Sequence[Course], bar: Progress) -> dict[str, list[Episode]]:
    if build_gil_holder(scratch) is None:
        raise SystemExit("recovery.py: needs a C compiler (gcc or cc) to hold the GIL from C; install one")
    task = bar.add_task("mend", total=sum(len(course.harms) for course in todo))
    found = {}
    async with a_hospital(scratch) as hospital:
        for course in todo:
            async with hospital.run(course.name, course.spec) as patient:
                found[course.name] = await patient.episodes(course.harms, partial(bar.advance, task))
    return found


def _import_seconds(ranks: int) -> float:
    """How long so many processes take, at once, to start Python and import what a rank needs; the second time."""
    command = [sys.executable, "-c", "import mend_trainer.train, torch._dynamo"]
    for _ in range(2):
        began = time.monotonic()
        started = [subprocess.Popen(command) for _ in range(ranks)]
        for each in started:
            each.wait()
        seconds = time.monotonic() - began
    return seconds


async def _measure_peer(
    make: Callable[[], Launcher], scratch: Path, sizes: Sequence[int], times: int, patience: float, bar: Progress
) -> PeerTimes:
    try:
        launcher = await asyncio.to_thread(make)
    except PeerUnavailable as why:
        return PeerTimes(why=str(why))
    found = PeerTimes(why="not with --quick")
    tell = partial(bar.advance, bar.add_task(launcher.name, total=len(sizes) * times + 1))
    for size in sizes:
        try:
            await _measure_size(launcher, scratch, size, times, patience, found, tell)
        except NeverTrained as why:
            print(f"{launcher.name}, {size} ranks: {why}", file=sys.stderr)
            found.why = "did not train steadily"
    return found


async def _measure_size(
    launcher: Launcher,
    scratch: Path,
    size: int,
    times: int,
    patience: float,
    found: PeerTimes,
    tell: Callable[[], object],
) -> None:
    """Kills with so many ranks; with two also a hang, after which a peer may be left standing."""
    arguments = [*TRAINER, "--set", f"data.cache={scratch}/data"]
    async with launched(launcher, scratch, arguments, size) as run:
        await run.steady()
        kills = found.kills.setdefault(size, [])
        for _ in range(times):
            back = (await injured(run, signal.SIGKILL, max(patience, 60.0))).back
            kills.extend([] if back is None else [back])
            tell()
        if size == 2:
            found.hang = (await injured(run, signal.SIGSTOP, patience)).back
            tell()


if __name__ == "__main__":
    raise SystemExit(main())
