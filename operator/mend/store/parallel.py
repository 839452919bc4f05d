"""Several things at once, on daemon threads: a transfer that is stuck never holds up the end of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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
