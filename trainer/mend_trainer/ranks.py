"""One rank as its agent sees it: its process, its page, what it prints and reports, and how it ended."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mend.protocol import RankError, RankExit, RankReport
from mend_trainer.logs import RankLog
from mend_trainer.progress import PageReader, PageSnapshot, create_page
from mend_trainer.told import ReportPipe


class Rank:
    """One rank: its process, page, pipes and end."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.pid = 0
        self.page_path = folder / f"rank-{rank}.page"
        self.stacks_path = folder / f"rank-{rank}.stacks"
        self.socket_path = folder / f"rank-{rank}.sock"
        create_page(self.page_path)
        self.stacks_path.touch(mode=0o600)
        self._page = PageReader(self.page_path)
        self._last_page: PageSnapshot | None = None  # once the page is closed
        self.log: RankLog | None = None
        self.reports: ReportPipe | None = None
        self.exit: RankExit | None = None
        self.exit_at = 0.0
        self.error: RankError | None = None
        self.error_at = 0.0

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

    def request_save(self) -> None:
        """Ask it to save at the end of its step."""
        if self._last_page is None:
            self._page.request_save()

    def report(self, now: float) -> RankReport:
        """The rank as a heartbeat tells it."""
        page = self.progress()
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
            loss=page.loss,
            nonfinite=page.nonfinite,
            tokens=page.tokens,
            longest_gaps=page.longest_gaps,
            exit=ended,
            error=error,
        )

    def close(self) -> None:
        """Let go of page and pipes; whoever still waits for something of this rank reads its last page."""
        if self._last_page is None:
            self._last_page = self._page.read()
            self._page.close()
        for pipe in (self.log, self.reports):
            if pipe is not None:
                pipe.close()
