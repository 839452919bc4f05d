"""How soon a fault is an incident: ranks that die, and every kind of hang under default settings, beside the peers.

    python benchmarks/detection.py [--quick] [--json FILE]

Two real agents with a rank each, heartbeats and limits as the spec has them by default, mend's own thinking without a
cluster around it. A fault begins when the signal is sent, or when the rank takes its request for a fault away; it is
noticed when the status holds the incident. torchrun and NVRx run the reference trainer and are read by their logs.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from figures import Peer, Row, arguments, publish, quantile, row
from launched import Launched, Launcher, NeverTrained, injured, launched, nvrx, torchrun
from peers import PeerUnavailable
from rich.console import Console
from rich.progress import Progress
from with_tests import build_gil_holder
from workbench import Workbench, a_spec

from injection import HUNG, KINDS, Blamed, FaultKind, Ground

PROGRAM = Path(__file__).with_name("steady_steps.py")
TRAINER = ["--set", "steps=1000000", "--set", "log_every_seconds=0"]
RANKS = 2
SHORT_STEP, LONG_STEP, KILLED_STEP = 0.1, 0.5, 0.02
LEARNT_STEPS = 16  # by then the limit of a step is learnt
KILL_P50, KILL_P99, HANG_STEPS, HANG_SECONDS, HANG_P99_STEPS = 0.020, 0.050, 2.0, 1.0, 3.0
PATIENCE_SECONDS = 120.0
HANG_KINDS = tuple(
    kind
    for kind in KINDS.values()
    if kind.incidents == HUNG and kind.blamed is Blamed.RANK and kind.ground is Ground.PLAIN
)


@dataclass(frozen=True, slots=True)
class Noticed:
    """One fault: seconds until it was an incident, the length of a step then, and whether exactly it was blamed."""

    kind: str
    seconds: float
    step_seconds: float
    exact: bool


@dataclass(slots=True)
class PeerFigures:
    """What was measured of a peer; `why` it was not, if so."""

    kills: list[float] = field(default_factory=list)
    hangs: list[float] = field(default_factory=list)
    hang_steps: list[float] = field(default_factory=list)
    innocent: int = 0  # hangs of which the first accused was another rank
    why: str = ""

    def figure(self, samples: Sequence[float], of: float) -> Peer:
        """The quantile; None if it never noticed."""
        if self.why:
            return self.why
        return round(median(samples) if of == 0.5 else quantile(samples, of), 4) if samples else None


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Detection", asyncio.run(measure(options)), options)


async def measure(options: Namespace) -> list[Row]:
    """All rows."""
    kills, rounds = (15, 1) if options.quick else (100, 2)
    lengths = (SHORT_STEP,) if options.quick else (SHORT_STEP, LONG_STEP)
    peer_times, patience = (2, 10.0) if options.quick else (10, 60.0)
    hangs = HANG_KINDS * rounds
    with tempfile.TemporaryDirectory(prefix="mend-bench-") as scratch, Progress(console=Console(stderr=True)) as bar:
        folder = Path(scratch)
        tell = partial(bar.advance, bar.add_task("mend", total=kills + len(lengths) * len(hangs)))
        killed = await _ours(folder / "kills", [KINDS["kill"]] * kills, KILLED_STEP, tell)
        hung = {each: await _ours(folder / f"steps-{each:g}", hangs, each, tell) for each in lengths}
        peers = {"torchrun": await _peer(torchrun, folder, peer_times, 0, patience, bar)}
        peers["NVRx"] = await _peer(nvrx, folder, peer_times, peer_times, patience, bar)
    return [
        *_rows_of_kills(killed, peers),
        *_rows_of_hangs(hung, peers, patience),
        *_rows_of_blame(killed, hung, peers),
    ]


def _rows_of_kills(killed: Sequence[Noticed], peers: dict[str, PeerFigures]) -> list[Row]:
    seconds = [1000 * each.seconds for each in killed]
    return [
        row(
            f"SIGKILL to a rank: the controller has the incident, {word}",
            seconds,
            1000 * target,
            unit="ms",
            of=of,
            peers={name: each.figure([1000 * one for one in each.kills], of) for name, each in peers.items()},
        )
        for word, of, target in (("p50", 0.5, KILL_P50), ("p99", 0.99, KILL_P99))
    ]


def _rows_of_hangs(hung: dict[float, list[Noticed]], peers: dict[str, PeerFigures], patience: float) -> list[Row]:
    rows = []
    peers = {**peers, "torchrun": PeerFigures(why="has no detection of hangs")}
    never = f"not in {patience:.0f} s"
    for length, found in hung.items():
        what = f"{len(HANG_KINDS)} kinds of hang, steps of {length:g} s"
        steps = [each.seconds / each.step_seconds for each in found]
        in_steps = {name: each.figure(each.hang_steps, 0.5) for name, each in peers.items()}
        rows.append(row(f"{what}: noticed, p50", steps, HANG_STEPS, unit="steps", peers=in_steps, limit=never))
        target = max(HANG_SECONDS, HANG_P99_STEPS * length)
        worst = {name: each.figure(each.hangs, 0.99) for name, each in peers.items()}
        seconds = [each.seconds for each in found]
        rows.append(row(f"{what}: noticed, p99", seconds, target, of=0.99, peers=worst, limit=never))
    return rows


def _rows_of_blame(
    killed: Sequence[Noticed], hung: dict[float, list[Noticed]], peers: dict[str, PeerFigures]
) -> list[Row]:
    every = [*killed, *(each for found in hung.values() for each in found)]
    wrong = [each for each in every if not each.exact]
    theirs: dict[str, Peer] = {}
    if (other := peers["NVRx"]).hangs:
        theirs["NVRx"] = 100.0 * other.innocent / len(other.hangs)
    percent = round(100.0 * len(wrong) / len(every), 2)
    note = f"NVRx: the first rank whose monitor gave up, of {len(other.hangs)} SIGSTOPs"
    kinds = ", ".join(sorted({each.kind for each in wrong}))
    return [
        Row(
            "of these, not blamed on exactly the guilty rank", "%", percent, 0.5, theirs,
            n=len(every), met=percent <= 0.5, note=f"{note}; ours: {kinds}" if kinds else note,
        )
    ]  # fmt: skip


# ---------------------------------------------------------------- mend
async def _ours(folder: Path, kinds: Sequence[FaultKind], step: float, tell: Callable[[], None]) -> list[Noticed]:
    faults = folder / "faults"
    faults.mkdir(parents=True)
    env = {"FAULTS": str(faults), "STEP_SECONDS": str(step)}
    if (library := build_gil_holder(folder)) is not None:
        env["GIL_HOLDER"] = str(library)
    else:
        kinds = [kind for kind in kinds if kind.name != "hold-gil"]
    command = [sys.executable, str(PROGRAM)]
    found = []
    # Hurt so often, mend would wait ever longer before it kills; noticing, which is measured, comes before that.
    spec = a_spec(RANKS, 1, command, health={"limits": {"pause": "500ms"}})
    async with Workbench(spec, command, folder, env) as bench:
        for number, kind in enumerate(kinds):
            try:
                await bench.until(lambda: bench.steps_done() >= LEARNT_STEPS, "steady steps", PATIENCE_SECONDS)
                found.append(await _one(bench, kind, number % RANKS, faults))
            except TimeoutError as why:  # fewer samples say so, and the rest is not lost
                print(f"{kind.name}: {why}", file=sys.stderr)
                break
            tell()
    return found


async def _one(bench: Workbench, kind: FaultKind, rank: int, faults: Path) -> Noticed:
    before, length = len(bench.noted_at), bench.step_seconds()
    at = await _injure(bench, kind, rank, faults)
    await bench.until(
        lambda: len(bench.noted_at) > before and not bench.is_open, f"{kind.name} at rank {rank}", PATIENCE_SECONDS
    )
    incident = bench.last_incident
    assert incident is not None
    exact = incident.culprit_ranks == (rank,) and incident.kind in kind.incidents
    return Noticed(kind.name, bench.noted_at[incident.id] - at, length, exact)


async def _injure(bench: Workbench, kind: FaultKind, rank: int, faults: Path) -> float:
    """Do it; when it began, by time.time()."""
    ranks = bench.ranks()
    if kind.signal is not None:
        at = time.time()
        os.kill(ranks[rank].pid, kind.signal)
        return at
    request, draft = faults / f"rank-{rank}", faults / "draft"
    draft.write_text(f"{kind.request} {max(each.step for each in ranks) + 2}")
    draft.rename(request)
    while request.exists():  # noqa: ASYNC110 - another process takes it away
        await asyncio.sleep(0.001)
    return time.time()


# ---------------------------------------------------------------- the peers
async def _peer(
    make: Callable[[], Launcher], folder: Path, kills: int, hangs: int, patience: float, bar: Progress
) -> PeerFigures:
    found = PeerFigures()
    try:
        launcher = await asyncio.to_thread(make)
    except PeerUnavailable as why:
        return PeerFigures(why=str(why))
    tell = partial(bar.advance, bar.add_task(launcher.name, total=kills + hangs))
    try:
        async with launched(launcher, folder, [*TRAINER, "--set", f"data.cache={folder}/data"], RANKS) as run:
            for number in range(kills + hangs):
                await _hurt_peer(run, number < kills, max(patience, 30.0), found)
                tell()
    except NeverTrained as why:
        print(f"{launcher.name}: {why}", file=sys.stderr)
        found.why = "" if found.kills else "did not train steadily"
    return found


async def _hurt_peer(run: Launched, is_kill: bool, patience: float, found: PeerFigures) -> None:
    hurt = await injured(run, signal.SIGKILL if is_kill else signal.SIGSTOP, patience)
    if hurt.noticed is None:
        return
    (found.kills if is_kill else found.hangs).append(hurt.noticed)
    if not is_kill:
        found.hang_steps.append(hurt.noticed / hurt.step_seconds)
        found.innocent += _accused(run, hurt.at) not in (None, RANKS - 1)


ACCUSED = re.compile(r"RankMonServer\S+:(\d+)\].*FT timeout elapsed")


def _accused(run: Launched, since: float) -> int | None:
    """The rank whose monitor was the first to give it up."""
    told = (ACCUSED.search(line) for at, line in run.lines if at > since)
    return next((int(each[1]) for each in told if each), None)


if __name__ == "__main__":
    raise SystemExit(main())
