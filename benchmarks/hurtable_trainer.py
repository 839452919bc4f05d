"""The reference trainer, which hangs on demand: SIGUSR2 makes it sleep for ever, SIGWINCH hold the GIL for ever.

Python runs a handler between two instructions of the main thread, so the rank stops before its next collective.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

import marks

from mend_trainer import train


def _sleep(number: int, frame: FrameType | None) -> None:
    time.sleep(3600)


def _hold_gil(number: int, frame: FrameType | None) -> None:
    ctypes.PyDLL(os.environ["GIL_HOLDER"]).hold()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, _sleep)
    signal.signal(signal.SIGWINCH, _hold_gil)
    marks.watch(train)
    train.main(sys.argv[1:])
