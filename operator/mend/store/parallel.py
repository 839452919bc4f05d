"""Several things at once, on daemon threads: a transfer that is stuck never holds up the end of the process."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """`work` done on every item, results in the order of the items.

    After a failure no further item is begun, and the first failure is raised once the threads have come back. (An
    executor of the standard library would be joined at exit, however long its transfers are stuck.)
    """
    if len(items) < 2 or workers < 2:
        return [work(item) for item in items]
    results: dict[int, Result] = {}
    failures: list[Exception] = []
    pending = iter(enumerate(items))
    lock = threading.Lock()

    def run() -> None:
        while not failures:
            with lock:
                taken = next(pending, None)
            if taken is None:
                return
            try:
                results[taken[0]] = work(taken[1])
            except Exception as failure:  # noqa: BLE001 - not handled here: raised in the caller's thread
                failures.append(failure)

    threads = [threading.Thread(target=run, name="mend-transfer", daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(items))]


def ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int, most: int) -> Iterator[Result]:
    """Results in the order of the items, of which `most` at the most are begun and not yet taken: memory is bounded.

    The first failure, in the order of the items, is raised in place of its result, and ends it.
    """
    waiting: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
    begun: deque[Future[Result]] = deque()

    def run() -> None:
        while (taken := waiting.get()) is not None:
            item, result = taken
            try:
                if result.set_running_or_notify_cancel():
                    result.set_result(work(item))
            except Exception as failure:  # noqa: BLE001 - not handled here: raised in the caller's thread
                result.set_exception(failure)

    for _ in range(workers):
        threading.Thread(target=run, name="mend-transfer", daemon=True).start()
    try:
        for item in items:
            if len(begun) == most:
                yield begun.popleft().result()
            begun.append(Future())
            waiting.put((item, begun[-1]))
        while begun:
            yield begun.popleft().result()
    finally:
        for left in begun:
            left.cancel()
        for _ in range(workers):
            waiting.put(None)
