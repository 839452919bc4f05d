"""The sockets by which process groups reach their peers, and how to cut them: gloo knows no abort of its own.

A rank that waits in a collective notices the death of a direct neighbour only; the neighbour's neighbours go on waiting
as long as its process lives. Once every survivor has cut its connections, each of them gets an error at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_OWN_DESCRIPTORS: Final = Path("/proc/self/fd")


class Connections:
    """Sockets that were opened while `recorded`. May be cut from another thread than the one that waits in them."""

    def __init__(self) -> None:
        self._found: dict[int, str] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around what opens them: joining a process group."""
        before = _sockets()
        yield
        self._found |= {number: name for number, name in _sockets().items() if before.get(number) != name}

    def cut(self) -> int:
        """Shut all of them down, on both ends, and forget them; how many there were.

        Descriptors stay open, since they are gloo's to close; one that has been closed and given to another file since
        is told by its inode.
        """
        found, self._found = self._found, {}
        return sum(_shut_down(number, name) for number, name in found.items())


def _sockets() -> dict[int, str]:
    """Every socket of this process: descriptor and the kernel's name of it, which holds its inode."""
    found: dict[int, str] = {}
    for entry in os.listdir(_OWN_DESCRIPTORS):  # noqa: PTH208 - plain numbers
        with suppress(OSError):
            name = os.readlink(_OWN_DESCRIPTORS / entry)  # noqa: PTH115 - the text itself, which is no path
            if name.startswith("socket:"):
                found[int(entry)] = name
    return found


def _shut_down(number: int, name: str) -> bool:
    with suppress(OSError), os.fdopen(os.dup(number), "rb", buffering=0) as mine:
        # Asked first: the number may be a plain file's by now, which no socket can be made of.
        if os.readlink(_OWN_DESCRIPTORS / str(mine.fileno())) != name:  # noqa: PTH115
            return False
        with socket.socket(fileno=os.dup(mine.fileno())) as copy:
            copy.getpeername()  # raises for one that listens: the next group may need it
            copy.shutdown(socket.SHUT_RDWR)
            return True
    return False
