"""The rank's end of the report pipe: facts for the agent, one JSON line each, that never stop the training loop."""

from __future__ import annotations

import os
import traceback
from typing import Final

from mend.environment import ENV_REPORT_FD
from mend.heartbeats import RankError
from mend.protocol import encode
from mend.reports import Report

PIPE_BYTES: Final = 1 << 20
_TRACEBACK_BYTES: Final = 8192


class Reporter:
    """Sends `Report`s, one line each. When the agent does not read (frozen, or gone), they are dropped and counted."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._unsent = b""  # rest of a line that the pipe took only in part: it goes first, or two lines become one
        self.dropped = 0
        if descriptor is not None:
            os.set_blocking(descriptor, False)

    @classmethod
    def from_environment(cls) -> Reporter:
        """The pipe that the agent opened (`MEND_REPORT_FD`). Outside mend: one that keeps everything to itself."""
        text = os.environ.get(ENV_REPORT_FD, "")
        try:
            return cls(int(text)) if text.isdigit() else cls(None)
        except OSError:  # in a child process that did not inherit the pipe
            return cls(None)

    def send(self, report: Report) -> bool:
        """Whether the pipe took the report."""
        if self._descriptor is None:
            return False
        line = self._unsent + encode(report) + b"\n"
        try:
            written = os.write(self._descriptor, line)
        except BlockingIOError:
            written = 0
        except OSError:  # the agent is gone, and soon this process
            self._descriptor = None
            return False
        if written < len(self._unsent) or (written == 0 and not self._unsent):
            self._unsent = self._unsent[written:]
            self.dropped += 1
            return False
        self._unsent = line[written:]
        return True


def describe(error: BaseException) -> RankError:
    """An exception as it is reported: the last of its traceback, which says most."""
    text = "".join(traceback.format_exception(error))
    return RankError(
        type=type(error).__qualname__,
        message=str(error)[:_TRACEBACK_BYTES],
        traceback=text[-_TRACEBACK_BYTES:],
        fatal=bool(getattr(error, "mend_fatal", False)),
    )
