"""Real ranks: processes that join a gloo group, each forked from a server that has torch imported already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.nn.parallel",
        "torch.optim",
        "mend_trainer.checkpoint",
    ]
)


class Rank:
    """One process of the gang."""

    def __init__(self, rank: int, process: BaseProcess, pipe: Connection) -> None:
        self.rank = rank
        self.process = process
        self._pipe = pipe

    def result(self, seconds: float = 90.0) -> Any:
        """What its work returned; fails with its traceback if it raised, or when there is nothing in time."""
        assert self._pipe.poll(seconds), f"rank {self.rank} has nothing to say after {seconds:g} s"
        kind, value = self._pipe.recv()
        assert kind == "returned", f"rank {self.rank} raised:\n{value}"
        return value

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """SIGSTOP."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def exit_code(self, seconds: float = 60.0) -> int | None:
        """How its process ended; None if it is still there after so long."""
        self.process.join(seconds)
        return self.process.exitcode


@contextmanager
def ranks(world: int, folder: Path, work: Callable[..., Any], *args: Any) -> Iterator[list[Rank]]:
    """`work(rank, *args)` on every rank of a new gang; whatever is left of it is killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{len(list(folder.iterdir()))}"
    gang: list[Rank] = []
    try:
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_live, args=(work, rank, world, str(meeting), theirs, dict(os.environ), args)
            )
            process.start()
            theirs.close()
            gang.append(Rank(rank, process, ours))
        yield gang
    finally:
        for each in gang:
            each.kill()


def run_ranks(world: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` returned on each rank."""
    with ranks(world, folder, work, *args) as gang:
        return [each.result() for each in gang]


def _live(
    work: Callable[..., Any],
    rank: int,
    world: int,
    meeting: str,
    pipe: Connection,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)  # the server of forks has that of the first test that needed it
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        pipe.send(("returned", work(rank, *args)))
    except BaseException:  # noqa: BLE001 - told to the test, which fails with it
        pipe.send(("raised", traceback.format_exc()))
