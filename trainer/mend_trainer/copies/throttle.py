"""Lets so many bytes a second go out, so that copies leave the network to the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_LEAST_PIECE_BYTES: Final = 4096
_BURST_SECONDS: Final = 0.1  # what was not used before this is lost


class Throttle:
    """A bucket that all transfers of a worker share; 0 bytes a second: no cap.

    Over any window of W seconds no more passes than `bytes_per_second` x (W + 0.1), and one piece.
    """

    def __init__(self, bytes_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_second = bytes_per_second
        self._clock = clock
        self._through_at = 0.0  # when all that was booked so far is through
        self._lock = threading.Lock()

    def piece_bytes(self, most: int) -> int:
        """How much to send at a time: what goes through within a quarter of a second, so that it trickles steadily."""
        return min(most, max(_LEAST_PIECE_BYTES, self.bytes_per_second // 4)) if self.bytes_per_second else most

    def book(self, size: int) -> float:
        """Seconds to wait before these bytes may be sent, behind all that was booked before."""
        with self._lock:
            now = self._clock()
            if not self.bytes_per_second:
                return 0.0
            self._through_at = max(self._through_at, now - _BURST_SECONDS) + size / self.bytes_per_second
            return max(0.0, self._through_at - now)
