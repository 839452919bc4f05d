"""The supervisor of one worker: keeps its attempt, obeys orders, tells how the ranks are, and knows when to go."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
import uuid
from collections.abc import Coroutine, Mapping
from typing import Final

from mend.environment import ENV_SNAPSHOT_TOKEN, ENV_TOKEN
from mend.evidence import Evidence
from mend.exitcodes import ExitCode
from mend.heartbeats import AgentState, Heartbeat, MemoryReport
from mend.orders import Ack, Check, Checked, Gather, Launch, Order, SaveNow, Stop
from mend_trainer.arenas import Arenas
from mend_trainer.bell import Bell
from mend_trainer.checking import check
from mend_trainer.command import understand
from mend_trainer.copies.credentials import read_credentials
from mend_trainer.copies.server import listen
from mend_trainer.copies.tls import snapshot_token
from mend_trainer.ending import save_and_end
from mend_trainer.evidence import gather
from mend_trainer.gang import Gang
from mend_trainer.hourglass import Hourglass
from mend_trainer.kernel import Reaper
from mend_trainer.logs import Output
from mend_trainer.podmemory import pod_memory
from mend_trainer.procfs import OutOfMemoryKills
from mend_trainer.runtime import RuntimeFolder
from mend_trainer.savers import Came, Guide, Holding, Said
from mend_trainer.settings import Settings
from mend_trainer.standbys import Standbys
from mend_trainer.starting import Tools
from mend_trainer.told import PointHistory, save_report

log = logging.getLogger(__name__)

_LONELY_SECONDS: Final = 60.0  # a finished agent waits this long for a controller to come and end it
_FLUSH_SECONDS: Final = 20.0  # after the last rank has gone, the newest snapshot is saved
_BURIAL_SECONDS: Final = 5.0


class Supervisor:
    """One worker's supervisor. All of it runs in one event loop; nothing here waits for a rank."""

    def __init__(self, settings: Settings, folder: RuntimeFolder, output: Output) -> None:
        loop = asyncio.get_running_loop()
        self.bell = Bell(self._look)
        self.curves: dict[int, PointHistory] = {}
        self.attempt = 0
        self._settings = settings
        self._folder = folder
        self._id = uuid.uuid4().hex
        self._sequence = 0
        self._gang: Gang | None = None
        self._forgotten = Hourglass(loop, _LONELY_SECONDS, lambda: self._leave(ExitCode.SUCCEEDED))
        self._deserted = Hourglass(loop, _FLUSH_SECONDS, self._flush)
        self._checking: asyncio.Task[Checked] | None = None
        self._ended: list[Gang] = []  # replaced by a newer attempt, some of their ranks still dying
        self._fence = 0  # attempts up to this one were stopped and never start again
        self._terminating = False
        self.exit: asyncio.Future[int] = loop.create_future()  # the code, once it is time to go
        self._endings: set[asyncio.Task[None]] = set()
        self._reaper = Reaper(loop)
        environment = _environment_of_ranks(os.environ)
        command = understand(settings.command)
        self._arenas = Arenas(settings.ranks_per_worker)
        self._holding = Holding()
        self._memory_limit = pod_memory().limit_bytes
        self._standbys = Standbys(
            loop=loop,
            reaper=self._reaper,
            output=output,
            environment=environment,
            command=command,
            preload=settings.preload,
            host=settings.host,
            wanted=settings.ranks_per_worker,
            arenas=self._arenas,
            listener=listen(settings.host) if read_credentials(environment) else None,
            changed=self.bell.ring,
            on_said=self._hear_saver,
        )
        self._tools = Tools(
            loop=loop,
            reaper=self._reaper,
            standbys=self._standbys,
            output=output,
            oom_kills=OutOfMemoryKills(),
            environment=environment,
            command=command,
            argv=settings.command,
            changed=self._changed,
            arenas=self._arenas,
            staged=self._standbys.wake_saver,
        )

    # ------------------------------------------------------------ telling
    @property
    def is_over(self) -> bool:
        """The agent is about to exit: streams say what there is to say and end."""
        return self.exit.done()

    @property
    def state(self) -> AgentState:
        """What it is doing with its attempt."""
        gang = self._gang
        if gang is None:
            return AgentState.IDLE
        if gang.has_succeeded:
            return AgentState.FINISHED
        if gang.stopped:
            return AgentState.STOPPING if gang.alive else AgentState.IDLE
        return AgentState.RUNNING

    @property
    def has_ranks(self) -> bool:
        """Whether any rank runs here, one of an attempt before that is still dying included."""
        return any(gang.alive for gang in self._gangs)

    @property
    def _gangs(self) -> tuple[Gang, ...]:
        """The present one, and those before it some of whose processes are left."""
        return (*self._ended, *([self._gang] if self._gang else []))

    @property
    def stands_for(self) -> float:
        """Seconds since any rank made its last mark; 0 without living ranks."""
        alive = self._gang.alive if self._gang is not None else ()
        return min((rank.silent_seconds for rank in alive), default=0.0)

    @property
    def step_seconds(self) -> float:
        """What the last step of the slowest of its living ranks took; for ever before there was one."""
        alive = self._gang.alive if self._gang is not None else ()
        return max((rank.step_seconds for rank in alive), default=0.0) or math.inf

    def heartbeat(self) -> Heartbeat:
        """A whole snapshot, as of now."""
        now = time.monotonic()
        gang, state = self._gang, self.state
        needed = self._arenas.needed_bytes
        self._sequence += 1
        return Heartbeat(
            attempt=self.attempt,
            worker=self._settings.worker,
            agent_id=self._id,
            state=state,
            sequence=self._sequence,
            ranks=tuple(rank.report(now) for rank in gang.ranks) if gang and state is not AgentState.IDLE else (),
            standbys_ready=self._standbys.ready,
            store_port=self._standbys.store_port,
            restored=gang.told.restored if gang else None,
            quarantined=gang.told.quarantined if gang else (),
            save=save_report(gang.told, now) if gang else None,
            held=self._holding.held,
            pending=gang.pending(self._holding.held) if gang else None,
            saver_port=self._standbys.saver_port,
            memory=MemoryReport(needed_bytes=needed, limit_bytes=self._memory_limit) if needed else None,
            store_requests=self._holding.requests,
            stored_bytes=self._holding.stored_bytes,
            terminating=self._terminating,
        )

    def _changed(self) -> None:
        """Something about ranks changed: tell it, and let go of gangs whose last process is gone."""
        for gang in [gang for gang in self._ended if gang.is_over]:
            gang.close()
            self._ended.remove(gang)
        self.bell.ring()

    def _hear_saver(self, said: Said) -> None:
        match said:
            case Holding():
                self._holding = said
                if self._deserted.has_ended:
                    self._flush()  # a save was given up, perhaps, and the step before is to be tried
                if self._gang is None or all(rank.is_alive for rank in self._gang.ranks):
                    return  # told at the next interval: it may change with every step
            case Came(attempt=attempt, outcome=outcome):
                if self._gang is None or attempt != self._gang.launch.attempt:
                    return  # of an older one: whoever needs it will find it in the store
                self._gang.heard(outcome)
        self.bell.ring()

    # ------------------------------------------------------------ obeying
    async def obey(self, order: Order) -> Ack | Evidence | Checked:
        """Carry out an order that is not of an older attempt."""
        match order:
            case Launch():
                return self._launch(order)
            case Gather():
                return await self._gather(order)
            case Stop():
                return self._stop(order)
            case SaveNow():
                return self._save_now(order)
            case Check():
                return await self._check(order)

    def _launch(self, order: Launch) -> Ack:
        if self._gang is not None and order.attempt == self.attempt:
            return self._ack(reason="launched already")
        if self._terminating or self.is_over:
            return self._refuse("this worker is terminating")
        if order.attempt <= self._fence:
            return self._refuse(f"attempt {order.attempt} was stopped before")
        before, kept = self._gang, self._gang.release(order) if self._gang is not None else {}
        if before is not None:
            before.kill()
            self._ended.append(before)
        log.info("attempt %d: ranks %d..%d", order.attempt, order.first_rank, order.first_rank + order.ranks - 1)
        self.attempt = order.attempt
        self._arenas.begin(order.attempt)
        plan = order.checkpoint
        self._standbys.guide(Guide(buddy=order.buddy, bytes_per_second=plan.peer_bytes_per_second if plan else 0))
        # Also where nobody is kept: who takes the places finds what the ranks before have left in them.
        goes_on = before is not None and bool(order.keep) and order.follows == before.launch.attempt
        folder = self._folder.attempt(order.attempt, before.folder if before is not None and goes_on else None)
        self._gang = Gang(order, folder, self._tools, kept)
        previous = sorted(self.curves)[-1:]  # streams may still owe points of it
        self.curves = {attempt: self.curves[attempt] for attempt in previous} | {order.attempt: self._gang.curve}
        self._changed()
        return self._ack()

    async def _gather(self, order: Gather) -> Ack | Evidence:
        if self._gang is None or order.attempt != self.attempt:
            return self._refuse(f"no ranks of attempt {order.attempt} here")
        return await gather(self._gang, self._settings.worker, order.seconds)

    def _stop(self, order: Stop) -> Ack:
        self._fence = max(self._fence, order.attempt)
        log.info("attempt %d: told to stop (%s)", self.attempt, order.reason or "no reason given")
        self._in_background(self._obey_stop(order, self._gang))
        return self._ack()

    async def _obey_stop(self, order: Stop, gang: Gang | None) -> None:
        """The gang is the one that was there when the order came: what was launched since is not meant."""
        await self._end(gang, order.grace_seconds)
        if order.exit:
            self._leave(order.exit_code)

    async def _check(self, order: Check) -> Ack | Checked:
        """Measure the machine; whoever asks for the same meanwhile gets the same answer."""
        if self._terminating or self.is_over:
            return self._refuse("this worker is terminating")
        if self.has_ranks:
            return self._refuse("ranks are running here")
        if self._checking is None or self._checking.done():
            environment = {**self._tools.environment, ENV_TOKEN: self._settings.token}  # for its neighbours
            work = check(order, self._settings.worker, environment, self._reaper)
            self._checking = asyncio.get_running_loop().create_task(work)
        return await asyncio.shield(self._checking)

    def _save_now(self, order: SaveNow) -> Ack:
        if self._gang is None or order.attempt != self.attempt or not self._gang.alive:
            return self._refuse(f"no ranks of attempt {order.attempt} here")
        for rank in self._gang.alive:
            rank.request_save()
        return self._ack()

    def _ack(self, reason: str = "") -> Ack:
        return Ack(accepted=True, attempt=self.attempt, reason=reason)

    def _refuse(self, reason: str) -> Ack:
        return Ack(accepted=False, attempt=self.attempt, reason=reason)

    # ------------------------------------------------------------ ending
    async def _end(self, gang: Gang | None, grace_seconds: float) -> None:
        """End the ranks."""
        if gang is not None and grace_seconds > 0:
            await save_and_end(gang, grace_seconds, self._arenas, self._standbys.wake_saver)
        elif gang is not None:
            gang.kill()
        self._changed()

    def _leave(self, code: int) -> None:
        if not self.exit.done():
            self.exit.set_result(code)
        self.bell.ring()

    def terminate(self) -> None:
        """SIGTERM: say so at once, save if time allows, and be gone within the grace period. Again: be gone now."""
        if self._terminating:
            self._leave(self._code_of_sigterm())
            return
        self._terminating = True
        log.info("told to terminate within %.0fs", self._settings.grace_seconds)
        self.bell.ring()
        # What is left after the ranks: a last heartbeat, burials, the last log lines.
        margin = min(2.0, self._settings.grace_seconds / 5)
        self._in_background(self._depart(self._settings.grace_seconds - margin))

    async def _depart(self, grace_seconds: float) -> None:
        await self._end(self._gang, grace_seconds)
        self._leave(self._code_of_sigterm())

    def _code_of_sigterm(self) -> ExitCode:
        return ExitCode.SUCCEEDED if self.state is AgentState.FINISHED else ExitCode.TERMINATED

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._ended_so)

    def _ended_so(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits an ending, so a mistake of ours in it must not leave the pod hanging."""
        self._endings.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the agent broke while ending ranks", exc_info=error)
            self._leave(ExitCode.AGENT_FAILED)

    def _look(self) -> None:
        """A finished agent whose controller does not come back ends by itself, so that its pod can.

        And what ranks that are gone, without others in their place, have left in memory is saved.
        """
        gang = self._gang
        self._forgotten.see(self.state is AgentState.FINISHED and not self.bell.listeners)
        self._deserted.see(gang is not None and gang.is_over and not gang.has_succeeded)

    def _flush(self) -> None:
        if self._gang is not None and self._arenas.flush(self._gang.launch.ranks):
            self._standbys.wake_saver()

    async def clean_up(self) -> None:
        """Kill what runs and wait a little for it to be gone; a process stuck in the kernel is left to the kernel."""
        gangs = self._gangs
        for gang in gangs:
            gang.kill()
        self._standbys.close()
        self._arenas.close()
        if not await self._reaper.all_buried(_BURIAL_SECONDS):
            log.warning("left behind: a process that was killed but does not die")
        for gang in gangs:
            gang.close()
        self._reaper.close()


def _environment_of_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The agent's own, without the token that would let a rank give orders."""
    kept = {name: value for name, value in environment.items() if name != ENV_TOKEN}
    if token := environment.get(ENV_TOKEN):
        kept[ENV_SNAPSHOT_TOKEN] = snapshot_token(token)
    kept.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; otherwise every rank takes every core
    kept.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun does
    kept.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that imports may ask for GPUs and yet be forked
    kept.setdefault("PYTHONUNBUFFERED", "1")  # the last lines before a crash are the ones that matter
    return kept
