"""The ranks of one attempt on this worker: started together, listened to, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from mend.exitcodes import ExitCode
from mend.heartbeats import RankError, RankExit
from mend.orders import Launch, Rejoin
from mend.reports import Committed, Measured, Raised, Rejoined, Report, SaveFailed, Staged
from mend.states import Held, Pending
from mend_trainer.kernel import Ending, kill_group, send
from mend_trainer.logs import RankLog
from mend_trainer.pipes import OrderPipe, make_pipes
from mend_trainer.procfs import cpu_ticks, descendants
from mend_trainer.ranks import Rank
from mend_trainer.starting import Tools, rank_environment, start
from mend_trainer.storekeeper import find_store
from mend_trainer.told import PointHistory, ReportPipe, Told, fold

log = logging.getLogger(__name__)

_STORE_SECONDS: Final = 30.0
_REJOIN_SECONDS: Final = 3.0  # what waits in a collective is there at once; what does not, would hold up all others
_REPEAT_SECONDS: Final = 0.25  # the order is said again: a rank that has obeyed passes over it
_IDLE_LOOKS: Final = 4  # so often in a row a rank that was told to rejoin had used no CPU at all: it will not come
_TOLD_LINES: Final = 20
_NOBODY: Final[Mapping[int, Rank]] = MappingProxyType({})


class Gang:
    """The ranks of one `Launch` on this worker, from the order to the end of the last of them.

    `kept` are ranks that another gang has released: their processes are told to go on in this one.
    """

    def __init__(self, launch: Launch, folder: Path, tools: Tools, kept: Mapping[int, Rank] = _NOBODY) -> None:
        self.launch = launch
        self.folder = folder
        self.told = Told()
        self.curve = PointHistory()
        numbers = range(launch.first_rank, launch.first_rank + launch.ranks)
        self.ranks = [kept[number] if number in kept else Rank(number, folder) for number in numbers]
        self.stopped = False
        self._tools = tools
        for rank in self.ranks:
            self._adopt(rank)
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

    def committed_step(self, rank: Rank) -> int:
        """Step of the newest checkpoint of this attempt to which the rank has contributed; -1: none."""
        place = rank.rank - self.launch.first_rank
        return max(rank.progress().committed_step, self._tools.arenas.committed_step(place, self.launch.attempt))

    def pending(self, held: Iterable[Held]) -> Pending | None:
        """The newest snapshots that all ranks here have published, unless the saver told that it holds them already."""
        launch = self.launch
        attempt, step = self._tools.arenas.reached(launch.ranks)
        ranks = tuple(range(launch.first_rank, launch.first_rank + launch.ranks))
        if attempt != launch.attempt or any(
            (each.attempt, each.step) == (attempt, step) and set(ranks) <= set(each.ranks) for each in held
        ):
            return None
        seconds = max(rank.progress().step_seconds for rank in self.ranks)
        return Pending(attempt=attempt, step=step, world_size=launch.world_size, ranks=ranks, step_seconds=seconds)

    def heard(self, outcome: Committed | SaveFailed) -> None:
        """What the saver tells of a save of this attempt."""
        self.told = fold(self.told, outcome, time.monotonic())

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
        self._starting.cancel()  # or one that is to rejoin would be followed by another
        for rank in self.alive:
            send(rank.pid, signal.SIGTERM)

    def close(self) -> None:
        """Let go of everything, when the gang is over or nobody will look at it again."""
        for rank in self.ranks:
            rank.close()

    def release(self, launch: Launch) -> dict[int, Rank]:
        """The ranks that may go on in `launch`, by number: they are not of this gang any more."""
        mine = self.launch
        expected = (launch.follows, launch.world_size, launch.first_rank, launch.ranks)
        if (mine.attempt, mine.world_size, mine.first_rank, mine.ranks) != expected:
            return {}
        kept = {rank.rank: rank for rank in self.ranks if rank.rank in launch.keep and rank.can_rejoin}
        self.ranks = [rank for rank in self.ranks if rank.rank not in kept]
        return kept

    # ------------------------------------------------------------ starting
    async def _start(self) -> None:
        launch = self.launch
        try:
            port = await find_store(launch.master_addr, launch.master_port, launch.attempt, _STORE_SECONDS)
            async with asyncio.TaskGroup() as bringing:
                for place in range(len(self.ranks)):
                    bringing.create_task(self._bring(place, port))
        except* (OSError, ValueError) as errors:  # no store, no memory for a process, nonsense from the store's port
            self._could_not_start(errors.exceptions[0])

    def _started(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits the start, so a mistake of ours in it must not stay unheard."""
        if not task.cancelled() and (error := task.exception()):
            log.error("attempt %d: the agent broke while starting ranks", self.launch.attempt, exc_info=error)
            self._could_not_start(error)

    async def _bring(self, place: int, store_port: int) -> None:
        """A kept rank is told to go on; a new one, or one that takes the place of a rank that does not, is started."""
        rank = self.ranks[place]
        if rank.pid:
            if await self._rejoins(rank, store_port):
                return
            rank = self.ranks[place] = self._successor_of(rank)
        await self._start_rank(rank, store_port)

    async def _start_rank(self, rank: Rank, store_port: int) -> None:
        tools = self._tools
        ours, theirs = make_pipes()
        rank.log = RankLog(tools.loop, ours.log, self._prefix_of(rank), tools.output)
        rank.reports = ReportPipe(tools.loop, ours.reports, rank.rank, lambda report: rank.on_report(report))
        rank.orders = OrderPipe(ours.orders)
        try:
            await start(rank, self.launch, store_port, theirs, tools, lambda ending: rank.on_end(ending))
        finally:
            theirs.close()
        tools.changed()

    # ------------------------------------------------------------ ranks that stay
    async def _rejoins(self, rank: Rank, store_port: int) -> bool:
        """Whether the process of `rank` is in this attempt within a few seconds."""
        order = Rejoin(
            attempt=self.launch.attempt, env=rank_environment(self.launch, rank, store_port, self._tools.arenas)
        )
        began = time.monotonic()
        spent, idle_looks = 0, 0
        while not rank.settled.is_set() and time.monotonic() - began < _REJOIN_SECONDS and idle_looks < _IDLE_LOOKS:
            if not rank.rejoin(order, began):
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPEAT_SECONDS):
                    await rank.settled.wait()
            before, spent = spent, cpu_ticks(rank.pid)
            idle_looks = idle_looks + 1 if spent == before else 0
        return rank.is_alive and rank.rejoins_since is None

    def _adopt(self, rank: Rank) -> None:
        """Hear of a rank from now on; what a kept one still says of the attempt before is for the gang it was of."""
        rank.on_end = functools.partial(self._on_end, rank)
        if not rank.pid:
            rank.on_report = functools.partial(self._on_report, rank)
            return
        rank.rejoins_since = time.monotonic()
        rank.settled.clear()
        before = rank.on_report

        def heard(report: Report) -> None:
            match report:
                case Rejoined(attempt=self.launch.attempt):
                    self._has_rejoined(rank)
                case Raised():
                    pass  # that is why it rejoins
                case _:
                    before(report)

        rank.on_report = heard

    def _has_rejoined(self, rank: Rank) -> None:
        rank.on_report = functools.partial(self._on_report, rank)
        if rank.log is not None:
            rank.log.call(self._prefix_of(rank))
        rank.has_rejoined()
        log.info("attempt %d rank %d goes on in its process", self.launch.attempt, rank.rank)
        self._tools.changed()

    def _successor_of(self, rank: Rank) -> Rank:
        """A new rank in the place of one that does not rejoin, whose end is nobody's concern."""
        log.warning("attempt %d: rank %d does not rejoin and is replaced", self.launch.attempt, rank.rank)
        rank.on_report = lambda _: None
        rank.on_end = lambda _: rank.close()
        if rank.is_alive:
            kill_group(rank.pid)
        else:
            rank.close()
        successor = Rank(rank.rank, self.folder)
        self._adopt(successor)
        return successor

    def _prefix_of(self, rank: Rank) -> str:
        return f"[attempt {self.launch.attempt} rank {rank.rank}] "

    # ------------------------------------------------------------ hearing
    def _on_report(self, rank: Rank, report: Report) -> None:
        match report:
            case Measured(point=point):
                self.curve.add(point)
                return  # told at the next interval: a point is no news
            case Staged():
                if rank.rank == 0:  # which speaks for all of what becomes of a save
                    self.told = fold(self.told, report, time.monotonic())
                self._tools.staged()
                return  # told once the saver has it
            case Raised(error=error):
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
        rank.settled.set()
        if self._starting.done():  # else its place is taken
            rank.rejoins_since = None
        self._tools.staged()  # perhaps it could not say so any more
        if not self.stopped:
            how = f"exit code {ending.code}" if ending.signal is None else signal.Signals(ending.signal).name
            log.info("attempt %d rank %d ended: %s%s", self.launch.attempt, rank.rank, how, " (OOM)" if oom else "")
        self._tools.changed()

    def _could_not_start(self, error: BaseException) -> None:
        """Ranks without a process are told as ones that broke off in the agent's hands."""
        log.error("attempt %d could not start: %s", self.launch.attempt, error)
        for rank in self.ranks:
            if rank.rejoins_since is not None:  # it cannot be told where to go
                rank.rejoins_since = None
                kill_group(rank.pid)
            if not rank.pid:
                rank.error = RankError(type=type(error).__name__, message=str(error))
                rank.exit = RankExit(code=ExitCode.AGENT_FAILED, log_tail=(str(error),))
                rank.error_at = rank.exit_at = time.monotonic()
        self._tools.changed()
