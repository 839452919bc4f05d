"""Waits for a condition with a generous deadline: what tests do instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


async def eventually(condition: Callable[[], Any], what: str = "", seconds: float = 30.0) -> Any:
    """The first true value of `condition`; fails with `what` when there is none in time."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert loop.time() < give_up_at, f"not within {seconds:g} s: {what or condition}"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = 30.0) -> Any:
    """The same for tests without an event loop."""
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.005)
    return found
