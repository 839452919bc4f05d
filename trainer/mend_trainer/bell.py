"""Wakes whoever waits for news of the agent: streams, that is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Bell:
    """Wakes every stream when something changed; `on_change` is told of that, and of streams that come and go."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._ears: set[asyncio.Event] = set()
        self._on_change = on_change

    def ring(self) -> None:
        """Something changed."""
        for ear in self._ears:
            ear.set()
        self._on_change()

    def listen(self) -> asyncio.Event:
        """An event of one's own, set at each ring; give it back to `leave`."""
        ear = asyncio.Event()
        self._ears.add(ear)
        self._on_change()
        return ear

    def leave(self, ear: asyncio.Event) -> None:
        """Listen no more."""
        self._ears.discard(ear)
        self._on_change()

    @property
    def listeners(self) -> int:
        """How many streams are open."""
        return len(self._ears)
