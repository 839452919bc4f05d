"""States by name: which checkpoint or which snapshots are meant, what they stand on, and where they lie."""

from __future__ import annotations

from typing import Final

from mend.protocol import Message

MEMORY_SCHEME: Final = "memory:"  # of a CheckpointRef: no place in the store


class Ancestor(Message, frozen=True, kw_only=True):
    """One link of a lineage: a checkpoint of `attempt` at `step` was restored by the attempt that came next.

    Runs that had the prefix one after the other may have used the same numbers: its uid tells their attempts apart.
    """

    attempt: int
    step: int
    uid: str = ""  # of the run; "" in what was written before links had one: any


class CheckpointRef(Message, frozen=True, kw_only=True):
    """A state by name: where the checkpoint is and which attempt made it at which step.

    Without a uri it is no checkpoint: a fresh start (step -1), or the state that ranks which rejoined had in memory.
    `memory:SAVE-ID` names snapshots in the shared memory of workers.
    """

    uri: str
    step: int
    attempt: int

    @property
    def is_of_peers(self) -> bool:
        """Whether it was handed on from memory to memory."""
        return not self.uri and self.step >= 0

    @property
    def save_in_memory(self) -> str:
        """The save whose snapshots in shared memory are meant; "" for anything else."""
        return self.uri.removeprefix(MEMORY_SCHEME) if self.uri.startswith(MEMORY_SCHEME) else ""


class Held(Message, frozen=True, kw_only=True):
    """Snapshots of one save that lie whole in one worker's memory, its own ranks' and copies of its buddy's."""

    save_id: str
    run_uid: str
    attempt: int
    step: int
    tokens: int
    world_size: int
    ranks: tuple[int, ...]  # whose snapshots, by the numbers of the world that saved
    lineage: tuple[Ancestor, ...] = ()


class Pending(Message, frozen=True, kw_only=True):
    """The newest snapshots of one worker's ranks, which all have published; their digests are still being taken."""

    attempt: int
    step: int
    world_size: int
    ranks: tuple[int, ...]  # all of this worker
    step_seconds: float  # how long that step took, and would take once more


class Holder(Message, frozen=True, kw_only=True):
    """Where one rank's snapshot of a save lies."""

    save_id: str
    rank: int  # of the world that saved
    worker: int
    url: str  # https://HOST:PORT of that worker's saver; needless where the worker is the asker's own
