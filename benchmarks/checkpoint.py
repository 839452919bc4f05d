"""What checkpoints cost: the stall of a save, the steps beside it, coming back, digests, and steps that are lost.

    python benchmarks/checkpoint.py [--quick] [--json FILE]

Ways to save alternate within one process, each beside a plain copy of the same bytes, so that the machine's moods hit
all alike; where not everything fits into memory, mend and each peer have processes of their own, each with its copy.
Peers: torch.distributed.checkpoint, torch.save, and NVRx's asynchronous checkpoints where there is CUDA for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import steps_lost
import xxhash
from figures import Peer, Row, arguments, not_built, publish, row
from peers import NVRX, PeerUnavailable, python_of
from rich.console import Console
from rich.progress import Progress
from saving_ways import PEERS
from slowdown_loop import STEPS

from s3 import free_port

HERE = Path(__file__).parent
STALL, SLOWER_PERCENT, RESTORE, DIGEST_SECONDS_PER_GB = 1.1, 5.0, 1.5, 0.25
RANKS = 2
ASYNCHRONOUS = ("mend", "dcp.async_save, thread", "dcp.async_save, process", "NVRx async")
COPIES = 6  # of the state, that one process with all ways holds
LIMIT_SECONDS = 3600.0
OTHERS = (("peer_copies", "copies of snapshots with peers"),)  # measured by modules of their own
Lines = dict[str, list[Any]]


def main() -> int:
    """Run it."""
    options = arguments(__doc__ or "")
    return publish("Checkpoints", measure(options), options)


def measure(options: Namespace) -> list[Row]:
    """All rows."""
    sizes, rounds = ((100, 400), 3) if options.quick else ((100, 1000, 4000), 7)
    found: list[Row] = []
    with Progress(console=Console(stderr=True)) as bar, tempfile.TemporaryDirectory(prefix="mb-") as scratch:
        folder = Path(scratch)
        for size in sizes:
            tell = _teller(bar, f"stall, {size} MB", rounds)
            found.append(stall_row(size, *stalls(size, rounds, folder / "stall", tell)))
        tell = _teller(bar, "slowdown", rounds)
        found.append(slowdown_row(*slowdowns(2 if options.quick else 2 * rounds, folder / "slowdown", tell)))
        for size in sizes[-2:]:
            tell = _teller(bar, f"restore, {size} MB", rounds)
            command = [sys.executable, HERE / "restore_loop.py", size, rounds, folder / "restore", free_port()]
            found.append(restore_row(size, gathered(_lines(command, tell))[0]))
        found.append(digest_row(rounds))
        losses = 2 if options.quick else 10
        found += asyncio.run(steps_lost.rows(losses, _teller(bar, "steps lost", 3 * losses)))
        for module, what in OTHERS:
            found += others(module, what, options)
    return found


def _teller(bar: Progress, name: str, total: int) -> Callable[[], object]:
    task = bar.add_task(name, total=total)
    return lambda: bar.advance(task)


# ---------------------------------------------------------------- thinking
def gathered(lines: Iterable[Mapping[str, Any]]) -> tuple[Lines, dict[str, Peer]]:
    """What each way took, and why others could not be gone."""
    taken: Lines = defaultdict(list)
    missing: dict[str, Peer] = {}
    for line in lines:
        if "why" in line:
            missing[line["way"]] = line["why"]
        else:
            taken[line["way"]].append(line.get("steps", line.get("seconds")))
    return taken, missing


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def stall_row(size: int, taken: Sequence[Lines], missing: Mapping[str, Peer]) -> Row:
    """Stalls in copies of the state, each beside the copies of its own process."""
    relative = {
        name: ratios(seconds, each["memcpy"]) for each in taken for name, seconds in each.items() if name != "memcpy"
    }
    ours = relative.pop("mend")
    peers: dict[str, Peer] = {name: round(median(found), 2) for name, found in relative.items()}
    copy = next(median(each["memcpy"]) for each in taken if "mend" in each)
    note = f"a memcpy takes {1000 * copy:.0f} ms, the same copy and the peers' in one process"
    return row(
        f"stall of the loop per save, {size} MB a rank", ours, STALL, unit="memcpy", peers={**peers, **missing},
        note=note if len(taken) == 1 else f"{note} each, since not all fit into memory at once",
    )  # fmt: skip


def slowdown_row(taken: Lines, missing: Mapping[str, Peer]) -> Row:
    """By how many percent steps beside a save are longer than beside an idle copy."""
    sums = {name: [sum(steps) for steps in found] for name, found in taken.items()}
    percent = {
        name: [100 * (each - 1) for each in ratios(found, sums["copy"])]
        for name, found in sums.items()
        if name not in ("bare", "copy")
    }
    ours = percent.pop("mend")
    peers: dict[str, Peer] = {name: round(median(found), 1) for name, found in percent.items()}
    bare = median(sums["bare"])
    above = 100 * (median(sums["copy"]) / bare - 1)
    note = f"{STEPS} steps of {1000 * bare / STEPS:.0f} ms from the start of the save; the idle copy costs {above:.0f}%"
    figure = f"steps beside a save, {RANKS} ranks, above steps beside an idle copy of the same bytes"
    sync = {"dcp.save": "no steps meanwhile", "torch.save": "no steps meanwhile"}
    return row(figure, ours, SLOWER_PERCENT, unit="%", peers={**peers, **sync, **missing}, note=note)


def restore_row(size: int, taken: Lines) -> Row:
    """Coming back from shared memory, in copies of the state."""
    peers: dict[str, Peer] = {"dcp.load": round(median(ratios(taken["dcp.load"], taken["memcpy"])), 2)}
    note = f"a memcpy takes {1000 * median(taken['memcpy']):.0f} ms; dcp.load reads from a disk whose cache is warm"
    figure = f"restore from shared memory, digests checked, {size} MB"
    return row(figure, ratios(taken["mend"], taken["memcpy"]), RESTORE, unit="memcpy", peers=peers, note=note)


def digest_row(rounds: int, size: int = 256 << 20) -> Row:
    """Seconds of one core to digest a gigabyte."""
    data = os.urandom(1 << 20) * (size >> 20)  # not zeros: those would be one page, and always in the cache
    ours, theirs = [], []
    for _ in range(max(5, rounds)):
        times = [time.perf_counter()]
        xxhash.xxh3_128_digest(data)
        times.append(time.perf_counter())
        hashlib.sha256(data).digest()
        times.append(time.perf_counter())
        mine, other = ((end - begin) * 1e9 / size for begin, end in pairwise(times))
        ours.append(mine)
        theirs.append(other)
    peers: dict[str, Peer] = {"sha256": round(median(theirs), 3)}
    return row("digest of 1 GB on one core (4 GB/s are 0.25 s)", ours, DIGEST_SECONDS_PER_GB, peers=peers)


# ---------------------------------------------------------------- doing
def stalls(size: int, rounds: int, folder: Path, tell: Callable[[], object]) -> tuple[list[Lines], dict[str, Peer]]:
    """What each way took, process by process, and why others could not be gone."""
    python, missing = _interpreter()
    names = ["mend", *(name for name in PEERS if name not in missing)]
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    groups = [tuple(names)] if room > COPIES * size * 1_000_000 else [(name,) for name in names]
    taken = []
    for group in groups:
        command = [python, HERE / "stall_loop.py", size, rounds, folder, free_port(), "memcpy", *group]
        found, why = gathered(_lines(command, tell))
        taken.append(found)
        missing |= why
    return taken, missing


def slowdowns(rounds: int, folder: Path, tell: Callable[[], object]) -> tuple[Lines, dict[str, Peer]]:
    """Steps beside each way's saves."""
    python, missing = _interpreter()
    names = [name for name in ASYNCHRONOUS if name not in missing]
    folder.mkdir()
    command = [python, HERE / "slowdown_loop.py", rounds, folder, *names]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    others = [
        subprocess.Popen(
            [*map(str, command)], env={**_environment(), **env, "RANK": str(rank)}, stdout=subprocess.DEVNULL
        )
        for rank in range(1, RANKS)
    ]
    try:
        found, why = gathered(_lines(command, tell, {**env, "RANK": "0"}))
    finally:
        for each in others:
            each.kill()
            each.wait()
    return found, {**missing, **why}


def _interpreter() -> tuple[Path | str, dict[str, Peer]]:
    """NVRx's, which has everything of ours too; without it, why."""
    try:
        return python_of(NVRX), {}
    except PeerUnavailable as why:
        return sys.executable, {"NVRx async": str(why)}


def _environment() -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _lines(
    command: Sequence[object], tell: Callable[[], object], env: Mapping[str, str] = {}
) -> Iterator[dict[str, Any]]:
    """The JSON lines of a program, as they come."""
    with subprocess.Popen(
        [*map(str, command)],
        env={**_environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    if found["way"] == "mend":
                        tell()
                    yield found
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{command[1]} ended with {process.returncode}; run it by hand to see why: {command}")


def others(module: str, what: str, options: Namespace) -> list[Row]:
    """The rows of a benchmark of its own, if this version has it."""
    if not (HERE / f"{module}.py").exists():
        return [not_built(what, 0.0, unit="", what=f"benchmarks/{module}.py")]
    return list(importlib.import_module(module).rows(options.quick))


if __name__ == "__main__":
    raise SystemExit(main())
