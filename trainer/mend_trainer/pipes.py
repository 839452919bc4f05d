"""The three pipes between an agent and one rank: its log, its reports, and the orders that it is given."""

from __future__ import annotations

import fcntl
import logging
import os
from dataclasses import dataclass
from typing import Final

from mend.orders import Rejoin
from mend.protocol import encode
from mend_trainer.reporting import PIPE_BYTES

log = logging.getLogger(__name__)

_F_SETPIPE_SZ: Final = 1031


@dataclass(frozen=True, slots=True)
class Pipes:
    """One end of each, as file descriptors."""

    log: int
    reports: int
    orders: int

    def close(self) -> None:
        """Close this end of each."""
        for each in (self.log, self.reports, self.orders):
            os.close(each)


def make_pipes() -> tuple[Pipes, Pipes]:
    """The agent's ends and the rank's."""
    log_read, log_write = os.pipe2(os.O_CLOEXEC)
    report_read, report_write = _report_pipe()
    orders_read, orders_write = os.pipe2(os.O_CLOEXEC)
    return Pipes(log_read, report_read, orders_write), Pipes(log_write, report_write, orders_read)


def _report_pipe() -> tuple[int, int]:
    """A large one, so that a busy agent loses no report."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(read, _F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        log.debug("the system grants no larger pipe for reports")
    return read, write


class OrderPipe:
    """The agent's end of a rank's orders. A rank that does not read them is not waited for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        os.set_blocking(descriptor, False)

    def send(self, order: Rejoin) -> bool:
        """Whether the pipe took the order."""
        if self._descriptor is None:
            return False
        line = encode(order) + b"\n"
        try:
            return os.write(self._descriptor, line) == len(line)
        except OSError:  # full, or nobody has the other end any more
            return False

    def close(self) -> None:
        """No more orders."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
