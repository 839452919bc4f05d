"""Savers in a thread of the test's own process: for stores that a test has spoilt, or ranks without an agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mend.reports import Committed, Staged
from mend.states import CheckpointRef, Held
from mend.store import Store
from mend_trainer.arenas import Arenas
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.checkpoint.links import SaverLink
from mend_trainer.checkpoint.saver import Saver
from mend_trainer.savers import Came, Holding, Said

_LOOK_SECONDS = 0.01
_LIVING: list[ThreadedSaver] = []


class ThreadedSaver:
    """As the real one, but for the process."""

    tells_agent = False

    def __init__(self, arena: Arena, store: Store) -> None:
        self._saver = Saver([arena], lambda _: None, lambda uri, endpoint: store)
        self._news = threading.Event()
        self._over = False
        threading.Thread(target=self._live, daemon=True).start()
        _LIVING.append(self)

    def wake(self, staged: Staged) -> None:
        """Look again."""
        self._news.set()

    def revive(self) -> None:
        """A thread does not die."""

    def close(self) -> None:
        """What is owed is saved all the same."""

    def end(self) -> None:
        """No more looks: else its arena, with all its descriptors, would stay as long as the tests' process."""
        self._over = True
        self._news.set()

    def _live(self) -> None:
        while self._news.wait() and not self._over:
            self._news.clear()
            self._saver.look()


class WorkersSaver:
    """The arenas and the saver of a worker whose ranks a test starts itself."""

    def __init__(self, places: int) -> None:
        self.said: list[Said] = []
        self.arenas = Arenas(places)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def committed(self) -> list[CheckpointRef]:
        """The checkpoints that rank 0 took part in, oldest first."""
        came = [said.outcome for said in self.said if isinstance(said, Came)]
        return [outcome.checkpoint for outcome in came if isinstance(outcome, Committed)]

    def wait_for_whole(self, step: int, ranks: tuple[int, ...], seconds: float = 60.0) -> str:
        """The save of that step, once all these ranks' snapshots are told to be in memory."""
        give_up_at = time.monotonic() + seconds
        while True:
            for held in self._held():
                if (held.step, held.ranks) == (step, ranks):
                    return held.save_id
            assert time.monotonic() < give_up_at, self.said
            time.sleep(_LOOK_SECONDS)

    def _held(self) -> tuple[Held, ...]:
        told = [said for said in self.said if isinstance(said, Holding)]
        return told[-1].held if told else ()

    def close(self) -> None:
        """No more looks; the arenas stay as long as anybody has them open."""
        self._over.set()
        self._thread.join()
        self.arenas.close()

    def _live(self) -> None:
        saver = Saver([Arena.attach(path) for path in self.arenas.own], self.said.append)
        while not self._over.wait(_LOOK_SECONDS):
            saver.look()


def end_savers() -> None:
    """End all savers that a test has started in threads."""
    while _LIVING:
        _LIVING.pop().end()


def with_store(store: Store) -> Callable[[Arena], SaverLink]:
    """What makes a saver that saves to this very store."""
    return lambda arena: ThreadedSaver(arena, store)
