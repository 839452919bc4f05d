"""How ranks come to save at the same step although a save can be wished for at any time, by any rank, or by the clock.

A save is a collective, so every rank must begin it at the end of the same step; asking each other at every step would
cost a collective per step. Instead rank 0 announces in the key-value store, at the end of step k, "save at the end of
step k + 2", and every rank reads the announcement at the end of each step, which takes one small request.

Why no rank can read it too late: training is synchronous, so no rank finishes step k + 1 before rank 0 has begun it
(its gradients are part of the reduction), and rank 0 begins it after the announcement. A rank's host may be one step
ahead of its device, never more (`Session.completed` sees to that), so when its host ends step k + 2 its device has
finished step k + 1: the announcement was made before, and the rank reads it in time. Nor is an announcement
overwritten before all have read it: the save itself is a collective, and the next announcement comes after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

_WISHES: Final = "wishes"
_SAVE_AT: Final = "save_at"
_STEPS_AHEAD: Final = 2


class Counters(Protocol):
    """The one operation of torch's `Store` that is needed: add to a counter, atomically, and learn its value."""

    def add(self, key: str, amount: int, /) -> int:
        """The counter after adding; a new one starts at 0."""
        ...


class SaveAgreement:
    """One rank's view: `is_due` is asked once at the end of each step and answers alike on all ranks."""

    def __init__(
        self,
        counters: Counters | None,
        *,
        rank: int,
        interval_steps: int | None = None,
        interval_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters  # None: a world of one rank
        self._rank = rank
        self._interval_steps = interval_steps
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._saved_at = clock()
        self._wishes_seen = 0
        self._save_at = 0  # 0: nothing announced; the earliest step that can be is 2
        self._owed = False  # a save that was due could not begin
        self._carried = False  # a wish that came while the announced step was ending

    def is_due(self, step: int, wished: bool) -> bool:
        """Whether to save at the end of `step`; `wished`: this rank was asked for a save since the last call."""
        by_count = self._interval_steps is not None and (step + 1) % self._interval_steps == 0
        counters = self._counters
        due = (wished or self._is_time) if counters is None else self._is_agreed(counters, step, wished)
        if due or by_count:
            self._saved_at, self._owed = self._clock(), False
        return due or by_count

    def postpone(self) -> None:
        """The save that was due could not begin, on no rank: bring it up again as soon as possible."""
        self._owed = True

    @property
    def _is_time(self) -> bool:
        late = self._interval_seconds is not None and self._clock() - self._saved_at >= self._interval_seconds
        return late or self._owed

    def _is_agreed(self, counters: Counters, step: int, wished: bool) -> bool:
        if self._rank == 0:
            self._announce(counters, step, wished)
        else:
            self._listen(counters, step, wished)
        return 0 < self._save_at == step

    def _announce(self, counters: Counters, step: int, wished: bool) -> None:
        wishes = counters.add(_WISHES, 0)
        others_wish = wishes > self._wishes_seen or self._carried
        self._wishes_seen, self._carried = wishes, False
        if step == self._save_at != 0:
            # Not to be overwritten before all have read it; and the wish may be of a rank that is past this step.
            self._carried = others_wish
        elif self._save_at <= step and (wished or others_wish or self._is_time):
            counters.add(_SAVE_AT, step + _STEPS_AHEAD - self._save_at)
            self._save_at = step + _STEPS_AHEAD

    def _listen(self, counters: Counters, step: int, wished: bool) -> None:
        if wished:
            counters.add(_WISHES, 1)
        announced = counters.add(_SAVE_AT, 0)
        if self._save_at != announced < step:
            raise RuntimeError(
                f"rank {self._rank} ended step {step} before it could learn of the save at step {announced}: this loop "
                "lets ranks run apart; set checkpoint.interval to a number of steps, which needs no agreement"
            )
        self._save_at = announced
