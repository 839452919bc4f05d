"""Splits a stream of bytes into lines of bounded length, at the cost of one `split` for each chunk."""

from __future__ import annotations


class LineTooLong(ValueError):
    """The peer sent a line beyond the limit; whatever follows cannot be trusted either."""


class LineSplitter:
    """Collects chunks and hands out whole lines, without their newline and without empty ones."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._begun = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, oldest first. Raises `LineTooLong`."""
        *lines, rest = chunk.split(b"\n")
        if lines and self._begun:
            lines[0] = bytes(self._begun) + lines[0]
            self._begun.clear()
        self._begun += rest
        longest = max(map(len, lines), default=0)
        if max(longest, len(self._begun)) > self.limit_bytes:
            raise LineTooLong(f"a line of more than {self.limit_bytes} bytes")
        return [line for line in lines if line]
