"""Log lines of ranks: prefixed onto the agent's own output, the last ones kept; floods and blocks do no harm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from typing import Final

from mend_trainer.linepipe import LinePipe

TAIL_LINES: Final = 40
_LINE_BYTES: Final = 8192  # a longer line is cut into several
_SHOWN_BYTES: Final = 1000  # of a line in the tail
_BYTES_PER_SECOND: Final = 1 << 20  # a rank may print this much, and as much again in a burst
_QUEUE_BYTES: Final = 4 << 20


class Output:
    """Writes to a file descriptor from a thread of its own: a reader that stalls makes lines drop, and nothing wait."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._dropped_lines = 0
        self._closing = False
        self._change = threading.Condition()
        # A daemon, since a blocked write must not keep the agent from exiting.
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        """Queue whole lines; drops and counts them when too much waits already."""
        with self._change:
            if self._queued_bytes + len(lines) > _QUEUE_BYTES:
                self._dropped_lines += lines.count(b"\n")
                return
            if self._dropped_lines:
                lines = b"[mend-agent] %d lines dropped: output was blocked\n%s" % (self._dropped_lines, lines)
                self._dropped_lines = 0
            self._queue.append(lines)
            self._queued_bytes += len(lines)
            self._change.notify()

    def close(self, seconds: float) -> None:
        """Write what waits, but no longer than this."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(seconds)

    def _write_all(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                batch = b"".join(self._queue)
                self._queue.clear()
            with contextlib.suppress(OSError):  # nobody reads any more
                view = memoryview(batch)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            with self._change:
                self._queued_bytes -= len(batch)


class OutputHandler(logging.Handler):
    """Sends the agent's own log records the same way."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one record."""
        self._output.write(self.format(record).encode(errors="replace") + b"\n")


class RankLog(LinePipe):
    """The log lines of one rank."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int, prefix: str, output: Output) -> None:
        super().__init__(loop, descriptor, _LINE_BYTES)
        self._prefix = prefix.encode()
        self._output = output
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._allowance = float(2 * _BYTES_PER_SECOND)
        self._refilled_at = time.monotonic()
        self._skipped_lines = 0

    def call(self, prefix: str) -> None:
        """Another prefix from now on."""
        self._prefix = prefix.encode()

    def tail(self) -> tuple[str, ...]:
        """The last lines, oldest first."""
        lines = [*self._tail, self.partial] if self.partial else [*self._tail]
        return tuple(line[:_SHOWN_BYTES].decode(errors="replace") for line in lines[-TAIL_LINES:])

    def close(self) -> None:
        """Read no more; a line that has begun is shown as it is."""
        super().close()
        if self.partial:
            begun, self.partial = self.partial, b""
            self.take([begun])

    def take(self, lines: list[bytes]) -> None:
        """Keep the last ones, and print them unless the rank prints too much."""
        self._tail.extend(lines[-TAIL_LINES:])
        if not self._may_print(sum(map(len, lines)) + len(lines)):
            self._skipped_lines += len(lines)
            return
        if self._skipped_lines:
            lines.insert(0, b"[mend-agent] %d lines skipped: too many at once" % self._skipped_lines)
            self._skipped_lines = 0
        # A progress bar rewrites its line by carriage returns; only what stays visible is kept.
        shown = (line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines)
        self._output.write(b"".join(b"%s%s\n" % (self._prefix, line) for line in shown))

    def _may_print(self, size: int) -> bool:
        """A token bucket: `_BYTES_PER_SECOND`, bursts of twice as much."""
        now = time.monotonic()
        gained = (now - self._refilled_at) * _BYTES_PER_SECOND
        self._allowance = min(2.0 * _BYTES_PER_SECOND, self._allowance + gained)
        self._refilled_at = now
        if size > self._allowance:
            return False
        self._allowance -= size
        return True
