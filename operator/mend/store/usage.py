"""What a store has cost so far: requests by kind, as services bill them, and bytes in both directions."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["put", "get", "list", "delete"]  # put: everything that writes, each part of an upload as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Since the store was opened. A request that was asked again counts each time, as it is billed."""

    requests: Mapping[Kind, int] = field(default_factory=dict)
    again: int = 0  # of the requests: those asked again after a transient error
    sent_bytes: int = 0
    handed_bytes: int = 0  # to the network or the disk so far, counted while it goes on; what is sent again, again
    received_bytes: int = 0
    waited_seconds: float = 0.0  # for the budget of requests, all threads together

    @property
    def total(self) -> int:
        """Requests of all kinds."""
        return sum(self.requests.values())


class Meter:
    """Counts, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[Kind] = Counter()
        self._again = 0
        self._sent_bytes = 0
        self._handed_bytes = 0
        self._received_bytes = 0
        self._waited_seconds = 0.0

    def count(
        self, kind: Kind, *, again: bool = False, sent: int = 0, received: int = 0, waited_seconds: float = 0.0
    ) -> None:
        """One more request."""
        with self._lock:
            self._requests[kind] += 1
            self._again += again
            self._sent_bytes += sent
            self._received_bytes += received
            self._waited_seconds += waited_seconds

    def hand(self, count: int) -> None:
        """So many bytes more have left."""
        with self._lock:
            self._handed_bytes += count

    def read(self) -> Usage:
        """All that was counted, at one moment."""
        with self._lock:
            return Usage(
                requests=dict(self._requests),
                again=self._again,
                sent_bytes=self._sent_bytes,
                handed_bytes=self._handed_bytes,
                received_bytes=self._received_bytes,
                waited_seconds=self._waited_seconds,
            )
