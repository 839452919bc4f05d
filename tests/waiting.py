"""Waits for a condition with a generous deadline: what tests do instead of sleeping."""

from __future__ import annotations

import asyncio
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
