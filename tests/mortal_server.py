"""An S3-compatible server that can be killed and started again at its address, paused, and whose disk can be filled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from s3 import S3Server, free_port, ministack, rclone
from saving_faults import Ground

DISK_BYTES = 256 << 20
_FILLER_BYTES = 1 << 20


class MortalServer:
    """A server of ours on a disk of its own, where the machine lets us mount one; it ends with `close`."""

    def __init__(self, ground: Ground, folder: Path) -> None:
        self._make: Callable[..., AbstractContextManager[S3Server]] = rclone if ground is Ground.RCLONE else ministack
        self.folder = folder
        self.has_disk = _mount(folder)
        self._port = free_port()
        self._running = ExitStack()
        self.server = self._running.enter_context(self._make(folder, self._port))

    @property
    def pid(self) -> int:
        """Of the process that serves now."""
        return self.server.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._running.close()

    def start(self) -> None:
        """Serve again, with what was durable."""
        self.server = self._running.enter_context(self._make(self.folder, self._port))

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def fill(self) -> None:
        """Leave no byte on its disk."""
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as filler:
            for _ in range(DISK_BYTES // _FILLER_BYTES + 1):
                filler.write(bytes(_FILLER_BYTES))

    def free(self) -> None:
        """Give the space back."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """End it, and let go of its disk."""
        with contextlib.suppress(ProcessLookupError):
            self.go_on()
        self._running.close()
        if self.has_disk:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False, capture_output=True)


@contextlib.asynccontextmanager
async def a_mortal_server(ground: Ground, folder: Path) -> AsyncIterator[MortalServer]:
    """A server for the length of a block."""
    server = await asyncio.to_thread(MortalServer, ground, folder)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.close)


def _mount(folder: Path) -> bool:
    """A disk of its own, in memory; False where we may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    return False
