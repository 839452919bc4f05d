"""How a rank's checkpointer reaches its saver: by way of its agent, or one that it has started itself."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from mend.reports import Report, Staged
from mend_trainer.checkpoint.arena import Arena
from mend_trainer.savers import Guide

_log = logging.getLogger(__name__)
_WAKE: Final = msgspec.json.encode(Guide())


class SaverLink(Protocol):
    """A way to a saver that looks at this rank's arena."""

    @property
    def tells_agent(self) -> bool:
        """Whether the agent hears from the saver what came of a save; else the rank has to report it."""
        ...

    def wake(self, staged: Staged) -> None:
        """There is a new snapshot."""
        ...

    def revive(self) -> None:
        """See to it that there is a saver, while something is owed."""
        ...

    def close(self) -> None:
        """Nothing more will come; what is owed is still saved."""
        ...


class AgentsSaver:
    """The worker's, a child of the agent, which hears of snapshots by the rank's reports and starts it when it dies."""

    tells_agent = True

    def __init__(self, report: Callable[[Report], None]) -> None:
        self._report = report

    def wake(self, staged: Staged) -> None:
        """As the protocol says."""
        self._report(staged)

    def revive(self) -> None:
        """The agent's business."""

    def close(self) -> None:
        """The agent's business."""


class OwnSaver:
    """A process of this rank alone, which outlives it until what is owed is saved."""

    tells_agent = False

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Its process; None before the first save."""
        return self._process.pid if self._process is not None else None

    def wake(self, staged: Staged) -> None:
        """As the protocol says."""
        self.revive()
        assert self._channel is not None
        with contextlib.suppress(OSError):  # it looks by itself before long, or is started anew
            self._channel.send(_WAKE, socket.MSG_DONTWAIT)

    def revive(self) -> None:
        """Start it, again if it has ended."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            _log.warning("the saver ended (%d) and is started again", self._process.returncode)
        self.close()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.shutdown(socket.SHUT_RD)  # the arena says it all: a full channel would hold the saver up
        descriptors = theirs.fileno(), self._arena.descriptor
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mend_trainer.checkpoint.saver", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,  # it must not end with the rank
        )
        theirs.close()

    def close(self) -> None:
        """As the protocol says."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
