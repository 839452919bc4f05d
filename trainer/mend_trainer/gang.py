"""The ranks of one attempt on this worker: started together, listened to, and ended."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import Final

from mend.protocol import ExitCode, Launch, Measured, Raised, RankError, RankExit, Report
from mend_trainer.kernel import Ending, kill_group, send
from mend_trainer.logs import RankLog
from mend_trainer.procfs import descendants
from mend_trainer.ranks import Rank
from mend_trainer.starting import Tools, report_pipe, start
from mend_trainer.storekeeper import find_store
from mend_trainer.told import PointHistory, ReportPipe, Told, fold

log = logging.getLogger(__name__)

_STORE_SECONDS: Final = 30.0
_TOLD_LINES: Final = 20


class Gang:
    """The ranks of one `Launch` on this worker, from the order to the end of the last of them."""

    def __init__(self, launch: Launch, folder: Path, tools: Tools) -> None:
        self.launch = launch
        self.told = Told()
        self.curve = PointHistory()
        self.ranks = tuple(Rank(launch.first_rank + local, folder) for local in range(launch.ranks))
        self.stopped = False
        self._tools = tools
        self._starting = tools.loop.create_task(self._start())
        self._starting.add_done_callback(self._started)

    @property
    def alive(self) -> tuple[Rank, ...]:
        """Ranks whose process runs."""
        return tuple(rank for rank in self.ranks if rank.is_alive)

    @property
    def is_over(self) -> bool:
        """No rank runs any more and none will."""
        return not self.alive and (self.stopped or all(rank.exit for rank in self.ranks))

    @property
    def has_succeeded(self) -> bool:
        """Every rank exited with 0 by itself."""
        return not self.stopped and all(rank.exit is not None and rank.exit.code == 0 for rank in self.ranks)

    # ------------------------------------------------------------ ending
    def kill(self) -> None:
        """SIGKILL every rank with all it has started, and wait for nothing: a big process takes its time to die."""
        self.stopped = self.stopped or not self.is_over
        self._starting.cancel()
        pids = [rank.pid for rank in self.alive]
        strays = descendants(pids) if pids else set()  # those that left the process group, found while linked
        for pid in pids:
            kill_group(pid)
        for pid in strays:
            send(pid, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM to every rank. Some then exit with 0, which does not mean that they were done."""
        self.stopped = self.stopped or not self.is_over
        for rank in self.alive:
            send(rank.pid, signal.SIGTERM)

    def close(self) -> None:
        """Let go of everything, when the gang is over or nobody will look at it again."""
        for rank in self.ranks:
            rank.close()

    # ------------------------------------------------------------ starting
    async def _start(self) -> None:
        launch = self.launch
        try:
            port = await find_store(launch.master_addr, launch.master_port, launch.attempt, _STORE_SECONDS)
            await asyncio.gather(*(self._start_rank(rank, port) for rank in self.ranks))
        except (OSError, ValueError) as error:  # no store, no memory for a process, nonsense from the store's port
            self._could_not_start(error)

    def _started(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits the start, so a mistake of ours in it must not stay unheard."""
        if not task.cancelled() and (error := task.exception()):
            log.error("attempt %d: the agent broke while starting ranks", self.launch.attempt, exc_info=error)
            self._could_not_start(error)

    async def _start_rank(self, rank: Rank, store_port: int) -> None:
        tools, attempt = self._tools, self.launch.attempt
        log_read, log_write = os.pipe2(os.O_CLOEXEC)
        report_read, report_write = report_pipe()
        rank.log = RankLog(tools.loop, log_read, f"[attempt {attempt} rank {rank.rank}] ", tools.output)
        rank.reports = ReportPipe(tools.loop, report_read, rank.rank, self._on_report)
        try:
            await start(rank, self.launch, store_port, (log_write, report_write), tools, self._on_end)
        finally:
            os.close(log_write)
            os.close(report_write)
        tools.changed()

    # ------------------------------------------------------------ hearing
    def _on_report(self, number: int, report: Report) -> None:
        match report:
            case Measured(point=point):
                self.curve.add(point)
                return  # told at the next interval: a point is no news
            case Raised(error=error):
                rank = self.ranks[number - self.launch.first_rank]
                rank.error, rank.error_at = error, time.monotonic()
            case _:
                self.told = fold(self.told, report, time.monotonic())
        self._tools.changed()

    def _on_end(self, rank: Rank, ending: Ending) -> None:
        for pipe in (rank.log, rank.reports):
            if pipe is not None:
                pipe.drain()
        oom = ending.signal == signal.SIGKILL and not self.stopped and self._tools.oom_kills.claim()
        tail = () if ending.code == 0 else rank.tail[-_TOLD_LINES:]  # it travels with every heartbeat from now on
        rank.exit = RankExit(code=ending.code, signal=ending.signal, oom_killed=oom, log_tail=tail)
        rank.exit_at = time.monotonic()
        if not self.stopped:
            how = f"exit code {ending.code}" if ending.signal is None else signal.Signals(ending.signal).name
            log.info("attempt %d rank %d ended: %s%s", self.launch.attempt, rank.rank, how, " (OOM)" if oom else "")
        self._tools.changed()

    def _could_not_start(self, error: BaseException) -> None:
        """Ranks without a process are told as ones that broke off in the agent's hands."""
        log.error("attempt %d could not start: %s", self.launch.attempt, error)
        for rank in self.ranks:
            if not rank.pid:
                rank.error = RankError(type=type(error).__name__, message=str(error))
                rank.exit = RankExit(code=ExitCode.AGENT_FAILED, log_tail=(str(error),))
                rank.error_at = rank.exit_at = time.monotonic()
        self._tools.changed()
