"""One agent, listened to for as long as it is wanted: dialled, heard, noticed when it goes, dialled again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from mend.backoff import Backoff
from mend.dial import UNDECODABLE, AgentError, Dialer, Target
from mend.heard import is_stale
from mend.heartbeats import Heartbeat, StreamMessage, decode_stream
from mend.lines import LineSplitter, LineTooLong
from mend.observation import AgentView

log = logging.getLogger(__name__)

DIAL_BACKOFF: Final = Backoff(base_seconds=0.02, ceiling_seconds=1.0)
EAGER_BACKOFF: Final = Backoff(base_seconds=0.02, ceiling_seconds=0.05)
EAGER_SECONDS: Final = 10.0  # how long an agent that should be up any moment is dialled that often
STEADY_SECONDS: Final = 1.0  # a stream that lived this long ends a row of failures
LINE_LIMIT_BYTES: Final = 4 << 20  # 8 ranks with a traceback and a log tail each stay far below


@dataclass(slots=True)
class PoolHealth:
    """Counters over all agents since the pool was made."""

    streams: int = 0  # opened
    failures: int = 0  # dials that did not lead to a stream, and streams that ended
    messages: int = 0
    garbage: int = 0  # streams closed because of what they carried
    stale: int = 0  # messages dropped as older than what is known
    crashes: int = 0  # bugs: a listener that ended with an unexpected exception and was started again


class Garbage(Exception):
    """An agent sent something that no agent sends."""


class Link:
    """The stream to one agent and the newest of what it told.

    `on_message(previous, message)` gets every message that is not stale, with the heartbeat before it; `on_change` is
    called when the connection comes, goes, or fails for another reason than before.
    """

    def __init__(
        self,
        name: str,
        target: Target,
        dialer: Dialer,
        health: PoolHealth,
        *,
        on_message: Callable[[Heartbeat | None, StreamMessage], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.target = target
        self.connected = False
        self.heartbeat: Heartbeat | None = None
        self.problem = "not connected yet"
        self._name = name
        self._dialer = dialer
        self._health = health
        self._on_message = on_message
        self._on_change = on_change
        self._clock = clock
        self._heard_at = clock()  # a new agent has been silent since it was wanted
        self._eager_until = clock() + EAGER_SECONDS
        self._hurry = asyncio.Event()
        self._is_wanted = True
        self._listen()

    def view(self) -> AgentView:
        """What is known of the agent now."""
        return AgentView(
            worker=self.target.worker,
            pod_uid=self.target.pod_uid,
            connected=self.connected,
            silent_seconds=self._clock() - self._heard_at,
            heartbeat=self.heartbeat,
            problem=self.problem,
        )

    def retarget(self, target: Target) -> None:
        """There is news of the agent's container: do not wait for the next dial."""
        self.target = target
        self._eager_until = self._clock() + EAGER_SECONDS
        self._hurry.set()

    def hang_up(self) -> asyncio.Task[None]:
        """The agent is no longer wanted. Says whose end to wait for."""
        self._is_wanted = False
        self.connected = False
        self._listener.cancel()
        return self._listener

    # ------------------------------------------------------------ listening
    def _listen(self) -> None:
        self._listener = asyncio.create_task(self._keep_listening(), name=f"stream of {self._name}")
        self._listener.add_done_callback(self._on_end)

    def _on_end(self, listener: asyncio.Task[None]) -> None:
        """A listener only ends when it is cancelled; anything else is a bug that must not silence the agent."""
        if listener.cancelled():
            return
        self._health.crashes += 1
        log.critical("the listener to %s broke", self._name, exc_info=listener.exception())
        if self._is_wanted:
            self.connected, self.problem = False, "internal error"
            asyncio.get_running_loop().call_later(DIAL_BACKOFF.ceiling_seconds, self._listen_again)

    def _listen_again(self) -> None:
        if self._is_wanted:
            self._listen()

    async def _keep_listening(self) -> None:
        failures = 0
        while True:
            began = self._clock()
            try:
                async with aclosing(self._dialer.stream(self.target)) as chunks:
                    await anext(chunks)
                    self._health.streams += 1
                    self._note(connected=True)
                    await self._hear(chunks)
                problem = "the agent closed the stream"
            except (Garbage, LineTooLong, *UNDECODABLE) as error:
                self._health.garbage += 1
                problem = f"garbage: {error}"
            except AgentError as error:
                problem = str(error)
            self._health.failures += 1
            was_steady = self.connected and self._clock() - began >= STEADY_SECONDS
            failures = 1 if was_steady else failures + 1
            self._note(connected=False, problem=problem)
            await self._rest(failures)

    async def _rest(self, failures: int) -> None:
        """Waits between two dials, or until there is reason to hurry."""
        is_expected = self.target.started and self._clock() < self._eager_until
        pace = EAGER_BACKOFF if is_expected else DIAL_BACKOFF
        try:
            async with asyncio.timeout(pace.seconds(failures, random.random)):
                await self._hurry.wait()
        except TimeoutError:
            return
        self._hurry.clear()

    async def _hear(self, chunks: AsyncIterable[bytes]) -> None:
        lines = LineSplitter(LINE_LIMIT_BYTES)
        async for chunk in chunks:
            for line in lines.feed(chunk):
                self._take(decode_stream(line))

    def _take(self, message: StreamMessage) -> None:
        self._health.messages += 1
        self._heard_at = self._clock()
        previous = self.heartbeat
        if isinstance(message, Heartbeat):
            if message.worker != self.target.worker:
                raise Garbage(f"it claims to be worker {message.worker}")
            if is_stale(previous, message):
                self._health.stale += 1
                return
            self.heartbeat = message
        self._on_message(previous, message)

    def _note(self, *, connected: bool, problem: str = "") -> None:
        if (connected, problem) != (self.connected, self.problem):
            self.connected, self.problem = connected, problem
            log.info("agent of %s: %s", self._name, problem or "connected")
            self._on_change()
