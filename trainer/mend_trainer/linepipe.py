"""The agent's end of a pipe on which a rank writes lines: read as they come, and to the end once the rank is dead."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from typing import Final

_READ_BYTES: Final = 1 << 16
_DRAIN_READS: Final = 64


class LinePipe(ABC):
    """Hands whole lines to `take`; a line beyond the longest is cut into several."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int, longest_bytes: int) -> None:
        self._loop = loop
        self._descriptor: int | None = descriptor
        self._longest_bytes = longest_bytes
        self.partial = b""  # the line that has begun
        os.set_blocking(descriptor, False)
        loop.add_reader(descriptor, self._read)

    @abstractmethod
    def take(self, lines: list[bytes]) -> None:
        """Some more lines, at least one, without their newlines."""

    def drain(self) -> None:
        """Read what is in the pipe now, for the writer is dead; bounded, for another process may hold the pipe."""
        for _ in range(_DRAIN_READS):
            if self._descriptor is None or not self._read():
                return

    def close(self) -> None:
        """Read no more."""
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> bool:
        """Whether something was there."""
        assert self._descriptor is not None
        try:
            chunk = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self.close()
            return False
        *lines, self.partial = (self.partial + chunk).split(b"\n")
        if len(self.partial) > self._longest_bytes:
            lines.append(self.partial)
            self.partial = b""
        if lines:
            self.take(lines)
        return True
