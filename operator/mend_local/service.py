"""A program that belongs to the cluster and runs beside it: started, started again when it dies, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from mend_local.processes import Process

log = logging.getLogger(__name__)

LOG_BYTES: Final = 10 * 2**20
_LOG_LOOK_SECONDS: Final = 5.0
_STOP_SECONDS: Final = 10.0


class Service:
    """Keeps one program running, with its output in `log`; a program that keeps dying is tried ever more rarely.

    The log is looked at every few seconds: beyond `log_bytes` it becomes `<name>.log.1`, in place of the one before.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        env: Mapping[str, str],
        root: Path,
        owner: str,
        pass_fds: Sequence[int] = (),
        backoff_seconds: float = 0.2,
        backoff_max_seconds: float = 30.0,
        log_bytes: int = LOG_BYTES,
        log_look_seconds: float = _LOG_LOOK_SECONDS,
    ) -> None:
        self.name = name
        self.log = root / f"{name}.log"
        self.restarts = 0
        self.process: Process | None = None
        self.last_exit: int | None = None
        self._command = command
        self._env = env
        self._root = root
        self._owner = owner
        self._pass_fds = pass_fds
        self._backoff = (backoff_seconds, backoff_max_seconds)
        self._log_limits = (log_bytes, log_look_seconds)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start it. Raises OSError when it cannot be executed at all."""
        self._root.mkdir(parents=True, exist_ok=True)
        self._launch()
        self._tasks = [asyncio.create_task(self._keep()), asyncio.create_task(self._bound_log())]

    @property
    def is_running(self) -> bool:
        """Whether its process is there now."""
        return self.process is not None and not self.process.has_exited

    def complaint(self) -> str:
        """The end of its log, to show a user why it does not work."""
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace")[-2000:]
        return ""

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for it and all that it started when that takes too long."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.process is not None:
            self.process.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.exited(), _STOP_SECONDS)
            self.process.signal(signal.SIGKILL)
            self.last_exit = await self.process.reap()
            self.process = None

    def _launch(self) -> None:
        with self.log.open("ab") as output:
            self.process = Process.start(
                self._command(),
                owner=self._owner,
                env=self._env,
                cwd=self._root,
                output=output.fileno(),
                pass_fds=self._pass_fds,
            )
        self.process.record(self._root / f"{self.name}.process.json")

    async def _bound_log(self) -> None:
        """By copying and emptying it: the program holds it open, to append, and cannot be told to open another."""
        most_bytes, look_seconds = self._log_limits
        while True:
            try:
                if self.log.stat().st_size > most_bytes:
                    await asyncio.to_thread(shutil.copyfile, self.log, self.log.with_suffix(".log.1"))
                    os.truncate(self.log, 0)
            except OSError as error:  # a full disk costs what was logged so far, lest it become fuller
                log.warning("the log of %s could not be put aside: %s", self.name, error)
                with contextlib.suppress(OSError):
                    os.truncate(self.log, 0)
            await asyncio.sleep(look_seconds)

    async def _keep(self) -> None:
        shortest, longest = self._backoff
        delay, loop = shortest, asyncio.get_running_loop()
        while True:
            began = loop.time()
            if self.process is not None:
                await self.process.exited()
                process, self.process = self.process, None
                self.last_exit = await process.reap()
            if loop.time() - began > longest:  # it had worked well: this is no crash loop
                delay = shortest
            log.warning("%s ended with %s; it is started again in %g s", self.name, self.last_exit, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, longest)
            try:
                self._launch()
            except OSError as error:
                log.error("%s cannot be started: %s", self.name, error)
            self.restarts += 1
