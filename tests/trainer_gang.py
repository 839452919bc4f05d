"""Gangs of real trainer ranks, launched as the agent does it: with a store, a launch order, pages and reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from mend.environment import ENV_LAUNCH, ENV_PAGE
from mend.keys import MANIFEST_NAME
from mend.manifest import Manifest, decode_manifest
from mend.orders import CheckpointPlan, Launch
from mend.protocol import encode
from mend.reports import Measured, Report, decode_report
from mend.states import CheckpointRef
from mend.store import open_store
from mend_trainer.polling import readable
from mend_trainer.progress import PageReader, PageSnapshot, create_page
from saver_thread import WorkersSaver

_PROGRAM = Path(__file__).parent / "programs" / "trainer_zygote.py"
_SOURCES = [str(Path(__file__).parents[1] / folder) for folder in ("operator", "trainer")]


class Zygote:
    """The process that has the trainer imported; one for many tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ":".join(_SOURCES)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def fork(self, argv: Sequence[str], env: dict[str, str], folder: Path) -> int:
        """Pid of a new rank."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": list(argv), "env": env, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it; its ranks are ended by whoever started them."""
        self._process.kill()
        self._process.communicate()


class TrainerRank:
    """One rank: its process, page and what it reported."""

    def __init__(self, zygote: Zygote, argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
        folder.mkdir(parents=True)
        create_page(folder / "page")
        self.folder = folder
        self._page = PageReader(folder / "page")
        self.pid = zygote.fork(argv, env | {ENV_PAGE: str(folder / "page")}, folder)
        self._pidfd = os.pidfd_open(self.pid)

    @property
    def page(self) -> PageSnapshot:
        """Its progress now."""
        return self._page.read()

    def request_save(self) -> None:
        """What the agent does on an order to save, and on SIGTERM."""
        self._page.request_save()

    def reports(self) -> list[Report]:
        """What it has reported so far."""
        lines = (self.folder / "reports").read_bytes().splitlines(keepends=True) if self.is_reporting else []
        return [decode_report(line) for line in lines if line.endswith(b"\n")]

    @property
    def is_reporting(self) -> bool:
        """Whether it has come far enough to have a pipe."""
        return (self.folder / "reports").exists()

    @property
    def log(self) -> str:
        """What it printed."""
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""

    def kill(self) -> None:
        """SIGKILL."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return

    def exit_code(self, seconds: float = 120.0) -> int | None:
        """How it ended by itself; None if it was killed. Fails if it is still there after so long."""
        assert self.is_gone(seconds), f"still running after {seconds:g} s; {self.page}\n{self.log}"
        told = self.folder / "exit"
        return int(told.read_text()) if told.exists() else None

    def is_gone(self, seconds: float = 0.0) -> bool:
        """Whether its process has ended."""
        return bool(readable([self._pidfd], seconds))

    def close(self) -> None:
        """Kill it if need be and let go of it."""
        self.kill()
        self.is_gone(30)
        os.close(self._pidfd)
        self._page.close()


class TrainerGang:
    """All ranks of one attempt."""

    def __init__(self, ranks: list[TrainerRank], saver: WorkersSaver | None = None) -> None:
        self.ranks = ranks
        self.saver = saver

    def succeed(self) -> TrainerGang:
        """Wait until all have ended well."""
        for number, rank in enumerate(self.ranks):
            assert rank.exit_code() == 0, f"rank {number}:\n{rank.log}"
        return self

    def wait_for(self, condition: Callable[[], Any], seconds: float = 90.0) -> Any:
        """The first true value of `condition` while no rank has ended."""
        give_up_at = time.monotonic() + seconds
        while not (found := condition()):
            gone = [rank.log for rank in self.ranks if rank.is_gone()]
            assert not gone, f"a rank ended too early:\n{gone[0]}"
            assert time.monotonic() < give_up_at, f"not within {seconds:g} s; {self.ranks[0].log}"
            time.sleep(0.002)
        return found

    def losses(self, name: str = "loss") -> dict[int, float | None]:
        """The curve that rank 0 reported."""
        points = [each.point for each in self.ranks[0].reports() if isinstance(each, Measured)]
        return {point.step: point.loss for point in points if point.name == name}

    def commits(self) -> list[CheckpointRef]:
        """What rank 0 committed, oldest first."""
        return self.saver.committed() if self.saver is not None else []

    def kill(self) -> None:
        """SIGKILL to the last rank, then to the rest, as an agent would."""
        for rank in reversed(self.ranks):
            rank.kill()
        for rank in self.ranks:
            assert rank.exit_code() is None


TINY_MODEL = "{hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32, context: 16}"


def a_little_text(folder: Path) -> Path:
    """Some files of text to train on, in this empty folder."""
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number} times {number} is {number * number}, they say.\n" * 30)
    return folder


def tiny_arguments(text: Path, *, steps: int, **changes: object) -> list[str]:
    """Arguments of the reference trainer for a model of some thousand parameters."""
    settings = {
        "steps": steps,
        "global_batch": 4,
        "schedule.warmup_steps": 2,
        "model": TINY_MODEL,
        "data.text": text,
        "data.sequence_length": 16,
        "data.cache": text.parent / "cache",
        **changes,
    }
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@contextmanager
def a_gang(
    zygote: Zygote,
    folder: Path,
    argv: Sequence[str],
    *,
    world: int = 2,
    attempt: int = 1,
    plan: CheckpointPlan | None = None,
    restore: Sequence[CheckpointRef] = (),
) -> Iterator[TrainerGang]:
    """Ranks of one attempt; whatever is left of them is killed at the end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch = Launch(
        attempt=attempt,
        world_size=world,
        first_rank=0,
        ranks=world,
        workers=1,
        master_addr="127.0.0.1",
        master_port=store.port,
        run="default/test",
        run_uid="1",
        restore=tuple(restore),
        checkpoint=plan,
    )
    env = {
        ENV_LAUNCH: encode(launch).decode(),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    gang: list[TrainerRank] = []
    saver = WorkersSaver(world)
    try:
        for rank in range(world):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank), **saver.arenas.environment(rank)}
            gang.append(TrainerRank(zygote, argv, own, folder / f"attempt-{attempt}-rank-{rank}"))
        yield TrainerGang(gang, saver)
    finally:
        for each in gang:
            each.close()
        saver.close()


def manifest_of(plan: CheckpointPlan, ref: CheckpointRef) -> Manifest:
    """The manifest of a committed checkpoint."""
    key = ref.uri.removeprefix(plan.uri + "/")
    return decode_manifest(open_store(plan.uri).get(f"{key}/{MANIFEST_NAME}"))


def digests_of(manifest: Manifest) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """Digest of every piece of every tensor, by where the piece lies in it."""
    return {
        name: sorted((chunk.offsets, chunk.digest) for chunk in entry.chunks)
        for name, entry in manifest.tensors.items()
    }
