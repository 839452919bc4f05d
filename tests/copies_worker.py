"""The memory of one worker and the server of its saver, in the process of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mend_trainer.checkpoint.arena import Arena, Snapshot
from mend_trainer.copies.server import SnapshotServer, listen
from mend_trainer.copies.shelf import ArenaShelf
from mend_trainer.copies.tls import read_run_tls, snapshot_token
from run_secrets import run_pem
from snapshots_made import RUN_UID

TOKEN = snapshot_token("token-of-the-run")


class Worker:
    """The memory of one worker and its server."""

    def __init__(
        self,
        own: int = 2,
        copies: int = 2,
        room_for: Callable[[int], str] = lambda size: "",
        connections: int = 1024,
    ) -> None:
        self.own = [Arena.create(f"own-{number}") for number in range(own)]
        self.copies = [Arena.create(f"copies-{number}") for number in range(copies)]
        self.shelf = ArenaShelf(self.own, self.copies, run_uid=RUN_UID, room_for=room_for)
        listener = listen("127.0.0.1")
        self.port = listener.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        self.server = SnapshotServer(listener, read_run_tls(run_pem()), TOKEN, self.shelf, connections)

    def copy_of(self, rank: int) -> Snapshot:
        """The newest copy of that rank's snapshots."""
        return max(
            (each for arena in self.copies for each in arena.snapshots() if each.header.rank == rank),
            key=lambda each: each.sequence,
        )


@contextmanager
def a_worker(**options: object) -> Iterator[Worker]:
    """A worker that is gone afterwards."""
    worker = Worker(**options)  # type: ignore[arg-type]
    try:
        yield worker
    finally:
        worker.server.close()
