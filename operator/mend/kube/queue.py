"""A queue of keys that need looking at: each at most once, never two looks at the same key at a time, with wake-ups.

A key has one due time, the earliest it was asked for. A look that begins fulfils it; a key that is asked for while it
is being looked at becomes due again once that look is done.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random as _random
import time
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from mend.backoff import Backoff

K = TypeVar("K", bound=Hashable)

STALE_LIMIT: Final = 64  # entries of the heap that nothing stands for any more
FAILURE_BACKOFF: Final = Backoff(base_seconds=0.1, ceiling_seconds=60.0)


class WorkQueue(Generic[K]):
    """For one event loop. Take a key with `get` (or `take`), look at it, then call `done` whatever came of it."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
        backoff: Backoff = FAILURE_BACKOFF,
    ) -> None:
        self._clock = clock
        self._random = random
        self._backoff = backoff
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []  # due times; entries that `_due` no longer confirms are stale
        self._order = itertools.count()
        self._busy: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()
        self.added = 0  # requests, duplicates included
        self.taken = 0  # looks begun
        self.retried = 0  # failures
        self.waited_seconds = 0.0  # sum over looks of the time between due and taken
        self.last_waited_seconds = 0.0

    # ------------------------------------------------------------ asking for a look
    def add(self, key: K) -> None:
        """Look at `key` now, or as soon as the look in progress is done."""
        self.add_after(key, 0.0)

    def add_after(self, key: K, seconds: float) -> None:
        """Look at `key` after `seconds`, unless that is asked for sooner anyway."""
        self.added += 1
        at = self._clock() + max(seconds, 0.0)
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            self._push(key)

    def failed(self, key: K) -> float:
        """Look at `key` again after a delay that grows with every failure in a row; says which."""
        self.retried += 1
        self._failures[key] = self._failures.get(key, 0) + 1
        seconds = self._backoff.seconds(self._failures[key], self._random)
        self.add_after(key, seconds)
        return seconds

    def forget(self, key: K) -> None:
        """The look went well: the next failure counts as the first."""
        self._failures.pop(key, None)

    # ------------------------------------------------------------ looking
    def take(self) -> K | None:
        """The key that has been due for longest and is not being looked at, if any is due now."""
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            at, _, key = heapq.heappop(self._heap)
            if key in self._busy or self._due.get(key) != at:
                continue  # `done` pushes it again, or another entry stands for it
            del self._due[key]
            self._busy.add(key)
            self.taken += 1
            self.last_waited_seconds = now - at
            self.waited_seconds += self.last_waited_seconds
            return key
        return None

    def done(self, key: K) -> None:
        """The look at `key` has ended."""
        self._busy.remove(key)
        if key in self._due:
            self._push(key)

    async def get(self) -> K:
        """Waits until a key is due and takes it."""
        while (key := self.take()) is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(self.next_wake_seconds()):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return key

    # ------------------------------------------------------------ questions
    def next_wake_seconds(self) -> float | None:
        """How long until a key may become due by itself; None if none will."""
        return max(self._heap[0][0] - self._clock(), 0.0) if self._heap else None

    def depth(self) -> int:
        """How many keys are due now and wait."""
        now = self._clock()
        return sum(at <= now for at in self._due.values())

    def __len__(self) -> int:
        """How many keys are due now or later."""
        return len(self._due)

    def _push(self, key: K) -> None:
        if key not in self._busy:
            heapq.heappush(self._heap, (self._due[key], next(self._order), key))
        if len(self._heap) > STALE_LIMIT + 2 * len(self._due):
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._changed.set()
