"""What the ranks of an attempt have told about saving, restoring and the loss, folded as their report lines come."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

import msgspec

from mend.heartbeats import Point, SaveReport
from mend.reports import (
    Committed,
    Measured,
    Quarantined,
    Raised,
    Rejoined,
    Report,
    Restored,
    SaveFailed,
    Skipped,
    Staged,
    Stepped,
    decode_report,
)
from mend.states import CheckpointRef
from mend_trainer.linepipe import LinePipe

log = logging.getLogger(__name__)

_LINE_BYTES: Final = 1 << 18
_KEPT_POINTS: Final = 50_000


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """Sum of the reports of one attempt. Times are the agent's monotonic clock, in seconds."""

    restored: CheckpointRef | None = None
    quarantined: tuple[str, ...] = ()
    committed: Committed | None = None
    committed_at: float = 0.0
    failures: int = 0
    error: str = ""
    skipped: int = 0
    begun_step: int = -1


def fold(told: Told, report: Report, now: float) -> Told:
    """What is known after one more report. Some belong to a rank, or to the curve."""
    match report:
        case Committed():
            return msgspec.structs.replace(told, committed=report, committed_at=now, failures=0, error="")
        case SaveFailed(step=step, error=error):
            return msgspec.structs.replace(told, failures=told.failures + 1, error=f"step {step}: {error}")
        case Skipped():
            return msgspec.structs.replace(told, skipped=told.skipped + 1)
        case Staged(step=step, owed=True):
            return msgspec.structs.replace(told, begun_step=step)
        case Restored(checkpoint=checkpoint):
            return msgspec.structs.replace(told, restored=checkpoint)
        case Quarantined(uri=uri) if uri not in told.quarantined:
            return msgspec.structs.replace(told, quarantined=(*told.quarantined, uri))
        case Quarantined() | Raised() | Measured() | Rejoined() | Stepped() | Staged():
            return told


def save_report(told: Told, now: float) -> SaveReport | None:
    """Health of saving as a heartbeat shows it; None while no save was begun, or due."""
    report = SaveReport(
        failures=told.failures,
        error=told.error,
        skipped=told.skipped,
        begun_step=told.begun_step,
    )
    if told.committed is None:
        return report if told.failures or told.skipped or told.begun_step >= 0 else None
    return msgspec.structs.replace(
        report,
        committed=told.committed.checkpoint,
        committed_age_seconds=max(0.0, now - told.committed_at),
        stall_seconds=told.committed.stall_seconds,
        commit_seconds=told.committed.commit_seconds,
        bytes=told.committed.bytes,
    )


class PointHistory:
    """The newest points of an attempt's curve; each reader keeps a position of its own."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=_KEPT_POINTS)
        self._total = 0

    def add(self, point: Point) -> None:
        """One more point; the oldest is forgotten when there are too many."""
        self._points.append(point)
        self._total += 1

    def after(self, position: int, most: int) -> tuple[tuple[Point, ...], int]:
        """Up to `most` points that come after `position` (0: from the start), and the position behind them."""
        forgotten = self._total - len(self._points)
        start = max(position, forgotten)
        points = tuple(islice(self._points, start - forgotten, start - forgotten + most))
        return points, start + len(points)


class ReportPipe(LinePipe):
    """The reports of one rank. A line that is no report is logged once and passed over."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, descriptor: int, rank: int, on_report: Callable[[Report], None]
    ) -> None:
        super().__init__(loop, descriptor, _LINE_BYTES)
        self._rank = rank
        self._on_report = on_report
        self._complained = False

    def take(self, lines: list[bytes]) -> None:
        """Tell of each report."""
        for line in lines:
            try:
                report = decode_report(line)
            except msgspec.MsgspecError as error:
                self._complain(f"{line[:80]!r}: {error}")
            else:
                self._on_report(report)

    def _complain(self, what: str) -> None:
        if not self._complained:
            log.warning("rank %d: unreadable line on its report pipe, ignored from now on: %s", self._rank, what)
            self._complained = True
