"""Measures how long something has been so, for who is told of changes only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Hourglass:
    """Calls `on_end` once something has held for so many seconds without a break."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, on_end: Callable[[], None]) -> None:
        self._loop, self._seconds, self._on_end = loop, seconds, on_end
        self._running: asyncio.TimerHandle | None = None
        self.has_ended = False  # and it holds still

    def see(self, holds: bool) -> None:
        """Whether it holds now; to be told whenever that may have changed."""
        if holds and self._running is None:
            self._running = self._loop.call_later(self._seconds, self._end)
        elif not holds and self._running is not None:
            self._running.cancel()
            self._running, self.has_ended = None, False

    def _end(self) -> None:
        self.has_ended = True
        self._on_end()
