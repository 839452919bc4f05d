"""What agents and ranks exit with, and what follows from it."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """What an agent (and so its pod), or a rank that uses the session, exits with."""

    SUCCEEDED = 0
    USER_ERROR = 1  # the training code raised; the traceback is in the report
    MISFIT = 65  # fatal: the checkpoint or configuration does not fit the model; trying again cannot help
    AGENT_FAILED = 70  # the agent itself broke
    UNSAVED = 73  # the last step was trained, but the store would not take it
    STORAGE = 74  # no checkpoint could be read although the run has some
    STOPPED = 75  # told to stop by the controller; the run goes on elsewhere or later
    BAD_CONFIG = 78  # fatal: the agent's environment or the command is unusable
    CANNOT_EXECUTE = 126  # fatal: the command is not executable
    NOT_FOUND = 127  # fatal: the command does not exist
    TERMINATED = 143  # SIGTERM (the pod is going); state was saved if time allowed


STORE_EXIT_CODES: Final = frozenset({ExitCode.UNSAVED, ExitCode.STORAGE})  # no rank's fault, on whatever machine
FATAL_EXIT_CODES: Final = frozenset({ExitCode.MISFIT, ExitCode.BAD_CONFIG, ExitCode.CANNOT_EXECUTE, ExitCode.NOT_FOUND})
