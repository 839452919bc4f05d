"""Wakes whoever waits for news of the agent: streams, that is."""

from __future__ import annotations

import asyncio


class Bell:
    """Wakes every stream when something changed."""

    def __init__(self) -> None:
        self._ears: set[asyncio.Event] = set()

    def ring(self) -> None:
        """Something changed."""
        for ear in self._ears:
            ear.set()

    def listen(self) -> asyncio.Event:
        """An event of one's own, set at each ring; give it back to `leave`."""
        ear = asyncio.Event()
        self._ears.add(ear)
        return ear

    def leave(self, ear: asyncio.Event) -> None:
        """Listen no more."""
        self._ears.discard(ear)

    @property
    def listeners(self) -> int:
        """How many streams are open."""
        return len(self._ears)
