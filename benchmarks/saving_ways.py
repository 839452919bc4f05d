"""Ways to save a state, each as whoever trains would call it: mend, torch's own, and NVRx where it can be had."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from mend.orders import CheckpointPlan
from mend_trainer.checkpoint import Checkpointer

State = Mapping[str, Any]
WAIT_SECONDS = 600.0
PIECE_BYTES = 16 << 20


class Way(Protocol):
    """`save` is what the loop waits for; `finish` waits for the rest, which the loop does not."""

    def save(self, step: int, state: State) -> None:
        """Save, or begin to."""
        ...

    def finish(self) -> None:
        """Everything is stored."""
        ...


def a_state(size: int) -> dict[str, Any]:
    """A model of so many bytes, in tensors of 16 MiB and some small ones, every page of it touched."""
    pieces = max(1, size // PIECE_BYTES)
    large = {f"layer.{n}": torch.rand(size // pieces // 4) for n in range(pieces)}
    return {"model": {**large, **{f"norm.{n}": torch.rand(1024) for n in range(16)}}}


def tensors_of(state: State) -> list[torch.Tensor]:
    """Its tensors."""
    return list(state["model"].values())


class Memcpy:
    """The least that anybody must do: one copy of the bytes into memory that is there already."""

    def __init__(self, folder: Path, state: State) -> None:
        self._room = [torch.empty_like(each).fill_(1) for each in tensors_of(state)]

    def save(self, step: int, state: State) -> None:
        """Copy."""
        for room, tensor in zip(self._room, tensors_of(state), strict=True):
            room.copy_(tensor)

    def finish(self) -> None:
        """Nothing is stored."""


class Mend:
    """mend's checkpointer, with a saver of its own."""

    def __init__(self, folder: Path, state: State) -> None:
        self._keeper = Checkpointer(
            CheckpointPlan(uri=f"file://{folder}"), run="bench/run", run_uid="uid", attempt=1, report=lambda _: None,
            may_repeat=True,
        )  # fmt: skip

    def save(self, step: int, state: State) -> None:
        """Copy into the arena; the saver does the rest."""
        assert self._keeper.save(step, step, state, {})

    def finish(self) -> None:
        """Committed."""
        assert self._keeper.wait(WAIT_SECONDS)


class _Folder:
    def __init__(self, folder: Path, state: State) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, step: int) -> str:
        """Where that step is saved."""
        return str(self._folder / str(step))


class TorchSave(_Folder):
    """`torch.save` to a file."""

    def save(self, step: int, state: State) -> None:
        """Write it, and see to it that it is on the disk, as the others do."""
        with open(self.place(step), "wb") as file:  # noqa: PTH123 - as users write it
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """It is stored."""


class DcpSave(_Folder):
    """`dcp.save`."""

    def save(self, step: int, state: State) -> None:
        """All of it."""
        dcp.save(state, checkpoint_id=self.place(step))

    def finish(self) -> None:
        """It is stored."""


class DcpAsync(_Folder):
    """`dcp.async_save` as its documentation has it."""

    kind = AsyncCheckpointerType.THREAD
    group: torch.distributed.ProcessGroup | None = None  # of its own, where the training has collectives meanwhile

    def save(self, step: int, state: State) -> None:
        """Begin."""
        self._future = dcp.async_save(
            state, checkpoint_id=self.place(step), async_checkpointer_type=self.kind, process_group=self.group
        )

    def finish(self) -> None:
        """Wait for the thread or process."""
        self._future.result()


class DcpAsyncProcess(DcpAsync):
    """The same with a process."""

    kind = AsyncCheckpointerType.PROCESS


class NvrxAsync(_Folder):
    """NVRx's asynchronous `torch.save`, with its persistent worker."""

    def __init__(self, folder: Path, state: State) -> None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt import TorchAsyncCheckpoint

        super().__init__(folder, state)
        self._keeper = TorchAsyncCheckpoint()

    def save(self, step: int, state: State) -> None:
        """Begin."""
        self._keeper.async_save(state, self.place(step))

    def finish(self) -> None:
        """Wait for the worker."""
        self._keeper.finalize_async_save(blocking=True)


WAYS: dict[str, Callable[[Path, State], Way]] = {
    "memcpy": Memcpy,
    "mend": Mend,
    "dcp.save": DcpSave,
    "dcp.async_save, thread": DcpAsync,
    "dcp.async_save, process": DcpAsyncProcess,
    "torch.save": TorchSave,
    "NVRx async": NvrxAsync,
}
PEERS = tuple(name for name in WAYS if name not in ("memcpy", "mend"))


def join_alone(port: str) -> None:
    """A process group of one, which dcp.async_save wants."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"})
    torch.distributed.init_process_group("gloo")


def opened(
    names: list[str], folder: Path, state: State, meet: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, Way | str]]:
    """Each way, or why it cannot be gone here: found out by going it once, which also warms it up.

    `meet` waits for the other ranks, so that nothing is cleared away that one of them still looks at.
    """
    for name in names:
        place = folder / name.replace(" ", "-").replace(",", "")
        try:
            way = WAYS[name](place, state)
            way.save(0, state)
            way.finish()
        except (ImportError, AssertionError, RuntimeError, ValueError, TypeError) as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            yield name, "needs CUDA" if "CUDA" in str(error) else f"failed: {type(error).__name__}"
            continue
        meet()
        clear(place)
        meet()
        yield name, way


def clear(folder: Path) -> None:
    """Take away what was stored there, as far as it can be told from what is being written."""
    for path in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
