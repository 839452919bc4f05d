"""The agent's folder for pages, sockets and stacks: in memory where possible, and swept when its owner was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

_PREFIX: Final = "mend-agent-"
_UNLOCKED_PREFIX: Final = "new-mend-agent-"
_MEMORY: Final = Path("/dev/shm")


class RuntimeFolder:
    """A fresh folder that lives as long as this process: a lock tells the next agent here whether its owner does."""

    def __init__(self, root: Path | None = None) -> None:
        root = root or _root()
        _sweep(root)
        unnamed = Path(tempfile.mkdtemp(prefix=f"{_UNLOCKED_PREFIX}{os.getpid()}-", dir=root))
        self._lock = _open_folder(unnamed)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = root / unnamed.name.replace(_UNLOCKED_PREFIX, _PREFIX)
        unnamed.rename(self.path)  # it gets the name that is swept only now that its lock is held

    def attempt(self, number: int, kept: Path | None = None) -> Path:
        """The folder of one attempt; those of earlier ones go. Ranks that stay keep theirs, and others join them."""
        if kept is not None:
            return kept
        for old in self.path.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        folder = self.path / str(number)
        folder.mkdir()
        return folder

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _root() -> Path:
    """A page on a disk's file system could stall its writer during writeback, so memory is preferred."""
    return _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _sweep(root: Path) -> None:
    """Remove the folders of agents that were killed: nobody holds their lock."""
    for folder in root.glob(_PREFIX + "*"):
        try:
            lock = _open_folder(folder)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
