"""A saver in a thread of the test's own process, for stores that a test has spoilt."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mend.protocol import Staged
from mend.store import Store
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.links import SaverLink
from mend_trainer.checkpoint.saver import Saver


class ThreadedSaver:
    """As the real one, but for the process."""

    tells_agent = False

    def __init__(self, arena: Arena, store: Store) -> None:
        self._saver = Saver([arena], lambda _: None, lambda uri, endpoint: store)
        self._news = threading.Event()
        threading.Thread(target=self._live, daemon=True).start()

    def wake(self, staged: Staged) -> None:
        """Look again."""
        self._news.set()

    def revive(self) -> None:
        """A thread does not die."""

    def close(self) -> None:
        """What is owed is saved all the same."""

    def _live(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            self._saver.look()


def with_store(store: Store) -> Callable[[Arena], SaverLink]:
    """What makes a saver that saves to this very store."""
    return lambda arena: ThreadedSaver(arena, store)
