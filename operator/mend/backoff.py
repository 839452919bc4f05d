"""How long to wait before trying again: exponential, jittered, capped. Pure: randomness is handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_DOUBLINGS = 60  # beyond it every ceiling is reached; keeps the power finite


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that double from `base_seconds` up to `ceiling_seconds`; each is drawn from its upper half.

    The jitter keeps many clients that failed together from coming back together.
    """

    base_seconds: float
    ceiling_seconds: float

    def seconds(self, failures: int, random: Callable[[], float]) -> float:
        """The delay after `failures` failures in a row (1 or more); `random` draws from [0, 1)."""
        doublings = min(max(failures - 1, 0), MAX_DOUBLINGS)
        full: float = min(self.base_seconds * 2.0**doublings, self.ceiling_seconds)
        return full * (0.5 + random() / 2)
