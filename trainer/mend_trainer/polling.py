"""Which descriptors are ready: by poll, since select knows no number above 1023, and trainers may open that many."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable


def readable(descriptors: Iterable[int | socket.socket], seconds: float | None) -> set[int]:
    """The numbers of those that can be read, or whose other end is gone; waits that long for one, None: for ever."""
    return _ready(descriptors, select.POLLIN, seconds)


def is_writable(descriptor: int | socket.socket, seconds: float) -> bool:
    """Whether it can be written to, or would say at once why not; waits that long."""
    return bool(_ready([descriptor], select.POLLOUT, seconds))


def _ready(descriptors: Iterable[int | socket.socket], event: int, seconds: float | None) -> set[int]:
    poll = select.poll()
    for each in descriptors:
        poll.register(each, event)
    return {number for number, _ in poll.poll(None if seconds is None else 1000 * seconds)}
