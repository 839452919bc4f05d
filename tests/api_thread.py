"""The laptop-sized Kubernetes in a thread of the test process, for tests that are not async and for kubectl."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mend_local.apiserver import ApiServer

T = TypeVar("T")


@contextmanager
def in_a_thread(make: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """Enter an async context manager in an event loop of its own; it is left with the context."""
    ready = threading.Event()
    box: dict[str, Any] = {}

    async def serve() -> None:
        box["loop"], box["over"] = asyncio.get_running_loop(), asyncio.Event()
        async with make() as entered:
            box["entered"] = entered
            ready.set()
            await box["over"].wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="mend-local")
    thread.start()
    ready.wait()
    if "entered" not in box:
        thread.join()
        raise RuntimeError("it did not start; the traceback of thread mend-local says why")
    try:
        yield box["entered"]
    finally:
        box["loop"].call_soon_threadsafe(box["over"].set)
        thread.join()


@contextmanager
def served_in_a_thread(state_dir: Path, **options: Any) -> Iterator[ApiServer]:
    """A running API server, without nodes."""
    with in_a_thread(lambda: ApiServer(state_dir, **options)) as server:
        yield server
