"""One rank as its agent sees it: its process, its page, what it prints and reports, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from mend.heartbeats import Phase, RankError, RankExit, RankReport
from mend.orders import Rejoin
from mend.reports import Report
from mend_trainer.footing import create_footing
from mend_trainer.kernel import Ending
from mend_trainer.logs import RankLog
from mend_trainer.pipes import OrderPipe
from mend_trainer.progress import PageReader, PageSnapshot, create_page
from mend_trainer.told import ReportPipe


class Rank:
    """One rank: its process, page, pipes and end. The gang that it is of sets `on_report` and `on_end`."""

    on_report: Callable[[Report], None]
    on_end: Callable[[Ending], None]

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.pid = 0
        self.page_path = folder / f"rank-{rank}.page"
        self.stacks_path = folder / f"rank-{rank}.stacks"
        self.socket_path = folder / f"rank-{rank}.sock"
        self.footing_path = folder / f"rank-{rank}.footing"
        # Another rank may have had this place: its files stay whole for whoever has them open.
        for path in (self.page_path, self.stacks_path, self.socket_path):
            path.unlink(missing_ok=True)
        create_footing(self.footing_path)
        create_page(self.page_path)
        self.stacks_path.touch(mode=0o600)
        self._page = PageReader(self.page_path)
        self._last_page: PageSnapshot | None = None  # once the page is closed
        self.log: RankLog | None = None
        self.reports: ReportPipe | None = None
        self.orders: OrderPipe | None = None
        self.exit: RankExit | None = None
        self.exit_at = 0.0
        self.error: RankError | None = None
        self.error_at = 0.0
        self.rejoins_since: float | None = None  # it was told to go on in another attempt, and is not there yet
        self.settled = asyncio.Event()  # it has rejoined, or ended instead

    @property
    def is_alive(self) -> bool:
        """Its process was started and has not ended."""
        return bool(self.pid) and self.exit is None

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines it printed."""
        return self.log.tail() if self.log else ()

    def progress(self) -> PageSnapshot:
        """What its page says, or said last."""
        return self._last_page or self._page.read()

    @property
    def silent_seconds(self) -> float:
        """Since its last mark; a word is read, not the whole page."""
        return self._page.silent_seconds() if self._last_page is None else 0.0

    @property
    def step_seconds(self) -> float:
        """What its last step took; 0 before there was one."""
        return self._page.step_seconds() if self._last_page is None else self._last_page.step_seconds

    def request_save(self) -> None:
        """Ask it to save at the end of its step."""
        if self._last_page is None:
            self._page.request_save()

    @property
    def can_rejoin(self) -> bool:
        """Whether its process could go on in another attempt."""
        return self.is_alive and self.rejoins_since is None and self.progress().can_rejoin

    def rejoin(self, order: Rejoin, now: float) -> bool:
        """Tell it to go on in another attempt, if it can be told; what it said of the one before is forgotten."""
        self.error, self.rejoins_since = None, now
        return self.orders is not None and self.orders.send(order)

    def has_rejoined(self) -> None:
        """It has left the attempt before."""
        self.rejoins_since = None
        self.settled.set()

    def report(self, now: float) -> RankReport:
        """The rank as a heartbeat tells it."""
        page = self.progress()
        if self.rejoins_since is not None:  # its page is still that of the attempt before
            waited = now - self.rejoins_since
            return RankReport(
                rank=self.rank,
                pid=self.pid,
                phase=Phase.STARTING,
                phase_seconds=waited,
                progress_seconds=waited,
                step=page.step,
                tokens=page.tokens,
            )
        ended = self.exit and msgspec.structs.replace(self.exit, age_seconds=max(0.0, now - self.exit_at))
        error = self.error and msgspec.structs.replace(self.error, age_seconds=max(0.0, now - self.error_at))
        return RankReport(
            rank=self.rank,
            pid=self.pid,
            phase=page.phase,
            phase_seconds=page.phase_seconds,
            progress_seconds=page.progress_seconds,
            step=page.step,
            step_seconds=page.step_seconds,
            steps_done=page.steps_done,
            stepped_seconds=page.stepped_seconds,
            waited_seconds=page.waited_seconds,
            loss=page.loss,
            nonfinite=page.nonfinite,
            tokens=page.tokens,
            longest_gaps=page.longest_gaps,
            can_rejoin=page.can_rejoin and ended is None,
            exit=ended,
            error=error,
        )

    def close(self) -> None:
        """Let go of page and pipes; whoever still waits for something of this rank reads its last page."""
        if self._last_page is None:
            self._last_page = self._page.read()
            self._page.close()
        for pipe in (self.log, self.reports, self.orders):
            if pipe is not None:
                pipe.close()
