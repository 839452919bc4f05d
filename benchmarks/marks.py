"""Marks that a rank writes on its way from a process to its first step, and the parts of a recovery between them.

Every rank appends to the one file that `MARKS` names; without it nothing is marked. Peers' ranks write the same marks,
so that their recoveries fall into the same parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ENV = "MARKS"
BEGAN, IMPORTED, JOINED, RESTORED, STEPPED = "began", "imported", "joined", "restored", "stepped"
PARTS = ("detect", "gather", "kill", "spawn", "import", "rendezvous", "build, restore", "first step")


@dataclass(frozen=True, slots=True)
class Mark:
    """`rank` has come to `what`; `at` is in seconds since the epoch."""

    at: float
    pid: int
    rank: int
    what: str


def mark(what: str, at: float | None = None) -> None:
    """Write one."""
    if path := os.environ.get(ENV):
        line = json.dumps([time.time() if at is None else at, os.getpid(), int(os.environ.get("RANK", "-1")), what])
        with open(path, "a", encoding="utf-8") as marks:  # noqa: PTH123 - one write, appended whole
            marks.write(line + "\n")


def read(path: Path) -> list[Mark]:
    """All marks so far, oldest first."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sorted((Mark(*json.loads(line)) for line in lines), key=lambda each: each.at)


def watch(train: ModuleType) -> None:
    """Marks this process's way through the reference trainer, which is imported by now."""
    if ENV not in os.environ:
        return
    mark(BEGAN, _began_at())
    mark(IMPORTED)
    join, session = train.join_gang, train.Session

    @contextlib.contextmanager
    def joined(*, deterministic: bool) -> Iterator[Any]:
        with join(deterministic=deterministic) as place:
            mark(JOINED)
            yield place

    class Marked(session):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            entered = super().__enter__()
            mark(RESTORED)
            return entered

        def completed(self, *args: Any, **more: Any) -> None:
            super().completed(*args, **more)
            mark(STEPPED)

    train.join_gang, train.Session = joined, Marked  # type: ignore[attr-defined]


def _began_at() -> float:
    """When this process was started, or forked; to a hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


def parts(
    at: float, noticed: float, decided: float, deaths: Iterable[float], marks: Sequence[Mark]
) -> dict[str, float] | None:
    """Seconds of each part of the recovery from a fault at `at`; None while it is not complete.

    Between two points the slowest process counts, and each part begins where the one before ended; so the parts add up
    to the whole. A standby was there before the fault: it has nothing to import, and its spawn is the handing over.
    """
    ended = max((each for each in deaths if each > at), default=decided)
    after = [each for each in marks if each.at > at]
    # A start that failed on its way, and was tried again, counts as part of what it takes to spawn.
    came = {each.pid for each in after if each.what == IMPORTED} & {each.pid for each in after if each.what == STEPPED}
    if not came:
        return None
    told = {
        what: [each.at for each in after if each.pid in came and each.what == what]
        for what in (IMPORTED, JOINED, RESTORED)
    }
    if any(len(each) < len(came) for each in told.values()):
        return None
    fresh = [each.at for each in marks if each.pid in came and each.what == BEGAN and each.at > at]
    restored = max(told[RESTORED])
    stepped = _first_of_all(after, restored)
    if stepped is None:
        return None
    spawned = max(fresh) if fresh else max(told[IMPORTED])
    points = (noticed, decided, ended, spawned, max(told[IMPORTED]), max(told[JOINED]), restored, stepped)
    found, last = {}, at
    for part, point in zip(PARTS, points, strict=True):
        found[part] = max(0.0, point - last)
        last = max(last, point)
    return found


def _first_of_all(marks: Sequence[Mark], since: float) -> float | None:
    """When every rank that is heard of had made a step after `since`."""
    ranks = {each.rank for each in marks}
    firsts: dict[int, float] = {}
    for each in marks:
        if each.what == STEPPED and each.at > since:
            firsts.setdefault(each.rank, each.at)
    return max(firsts.values()) if firsts and set(firsts) == ranks else None
