"""What one container is started with and leaves behind: its program, its output, and how a start can fail."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from mend_local.containerlog import READ_BYTES, ContainerLog
from mend_local.podspec import Command
from mend_local.podstatus import Terminated, now_rfc3339

log = logging.getLogger(__name__)

CANNOT_START: Final = 128  # containerd's exit code of a container that never ran, whatever the reason
_DRAIN_SECONDS: Final = 1.0
# What stands for the image: this Python, and what finding programs and libraries needs. Nothing else of the caller's
# environment reaches a pod, as nothing of a laptop's shell reaches a cluster.
_IMAGE_ENV: Final = ("HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")


def image_env() -> dict[str, str]:
    """The environment that the image would bring."""
    kept = {name: os.environ[name] for name in _IMAGE_ENV if name in os.environ}
    # Not resolved: the python of a virtual environment is a link, and what it links to knows no packages.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return kept | {"PATH": path}


def log_path(pod_root: Path, container: str) -> Path:
    """Where a container's output goes."""
    return pod_root / "logs" / f"{container}.log"


def record_path(pod_root: Path, container: str) -> Path:
    """Where it is written which process the container is; there only if it was ever started."""
    return pod_root / f"{container}.process.json"


class Output:
    """The pipe from a container to its log."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._log = ContainerLog(path, max_bytes)
        self._outlet, self.inlet = os.pipe()
        os.set_blocking(self._outlet, False)
        self._drained = asyncio.Event()

    def opened(self) -> None:
        """The child holds the other end now; read until nobody does."""
        os.close(self.inlet)
        asyncio.get_running_loop().add_reader(self._outlet, self._read)

    def close(self) -> None:
        """There is no child."""
        os.close(self.inlet)
        os.close(self._outlet)
        self._log.close()

    async def drained(self) -> None:
        """Wait for the end of the output, but not for a stranger who was handed the pipe and keeps it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), _DRAIN_SECONDS)
        if not self._drained.is_set():
            self._end()

    def _read(self) -> None:
        try:
            chunk = os.read(self._outlet, READ_BYTES)
        except BlockingIOError:
            return
        try:
            self._log.write(chunk)
        except OSError as error:  # a full disk costs log lines, not the pod
            log.warning("output of a container is lost: %s", error)
        if not chunk:
            self._end()

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._outlet)
        os.close(self._outlet)
        self._log.close()
        self._drained.set()


def find_program(word: str, path: str, cwd: Path) -> str:
    """The program that a command names. Raises FileNotFoundError or PermissionError as executing it would."""
    found = shutil.which(str(cwd / word) if "/" in word else word, path=path)
    if found is not None:
        return found
    if "/" in word and (cwd / word).exists():
        raise PermissionError(errno.EACCES, "permission denied", word)
    missing = "no such file or directory" if "/" in word else "executable file not found in $PATH"
    raise FileNotFoundError(errno.ENOENT, missing, word)


def start_error(command: Command, error: OSError, began: str) -> Terminated:
    """How a container ended that was never started, in containerd's words as far as somebody may look for them."""
    word = command.words[0]
    said = error.strerror or str(error)
    why = said if isinstance(error, NotADirectoryError) else f'exec: "{word}": {said[:1].lower()}{said[1:]}'
    message = f"failed to start container process: {why}"
    return Terminated(CANNOT_START, "StartError", began, now_rfc3339(), message=message)
