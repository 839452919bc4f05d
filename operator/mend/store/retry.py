"""When a store is asked again: transient errors only, after growing jittered pauses, until a deadline."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, stop_all

from mend.store.errors import StoreError

_LEAST_ATTEMPTS: Final = 3
_FIRST_SECONDS: Final = 0.2
_LONGEST_SECONDS: Final = 5.0
_LONGEST_ASKED_SECONDS: Final = 30.0  # a service that asks for a longer pause is given up at the deadline instead
# Ranks save in a thread beside the training: to draw from the global generator, as tenacity does, would change theirs,
# and a run whose store had stuttered once would no longer equal, bit for bit, one whose store had not.
_jitter: Final = random.SystemRandom()

Answer = TypeVar("Answer")


def is_transient(error: BaseException) -> bool:
    """Whether the same question may be answered in a moment."""
    return isinstance(error, StoreError) and error.transient


def until(deadline_seconds: float, ask: Callable[[], Answer]) -> Answer:
    """`ask` until it answers, fails for good, or the deadline has passed; then its last error is raised.

    It is asked three times at least: the transfer of a large part may take longer than the deadline before it breaks.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=pause,
        stop=stop_all(stop_after_delay(deadline_seconds), stop_after_attempt(_LEAST_ATTEMPTS)),
        reraise=True,
    )
    return retrying(ask)


def pause(state: RetryCallState) -> float:
    """Seconds before the next try: anything up to a bound that doubles, on top of what the service asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = min(error.retry_after_seconds, _LONGEST_ASKED_SECONDS) if isinstance(error, StoreError) else 0.0
    return asked + _jitter.uniform(0.0, min(_FIRST_SECONDS * 2.0 ** (state.attempt_number - 1), _LONGEST_SECONDS))
