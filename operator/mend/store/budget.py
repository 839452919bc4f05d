"""A request budget: a service that throttles a prefix throttles all who share it, so each asks only so often."""

from __future__ import annotations

import threading
import time


class RequestBudget:
    """Requests per second, shared by all threads of a store; what a second left unused may be spent in the next."""

    def __init__(self, per_second: float | None) -> None:
        """None: without limit."""
        if per_second is not None and not per_second > 0:
            raise ValueError(f"requests per second {per_second!r}: expected a number above 0")
        self._interval = 1.0 / per_second if per_second else 0.0
        self._free_at = 0.0  # when the next request may begin
        self._lock = threading.Lock()

    def take(self) -> float:
        """Wait for one's turn; the seconds waited."""
        if not self._interval:
            return 0.0
        with self._lock:
            now = time.monotonic()
            begin_at = max(self._free_at, now - 1.0)
            self._free_at = begin_at + self._interval
        wait_seconds = max(0.0, begin_at - now)
        time.sleep(wait_seconds)
        return wait_seconds
