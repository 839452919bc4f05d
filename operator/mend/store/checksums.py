"""The checksum that goes with every upload, so that the service refuses what changed on the way.

CRC-32C runs at 30 GB/s in the CRT's code, zlib's CRC-32 at under 2 (docs/decisions/0027). The latter needs no package
and is known to every service that knows any.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from mend.store.errors import WrongAnswer

try:
    from awscrt.checksums import crc32c as _crc32c
except ImportError:  # no wheel for this machine, or left out
    _crc32c = None


Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Checksum:
    """One of S3's algorithms, by the name that goes into its headers."""

    name: str
    _more: Callable[[memoryview, int], int]

    def of(self, views: Sequence[memoryview]) -> str:
        """Of the views' bytes in their order, as S3 writes it."""
        value = 0
        for view in views:
            value = self._more(view, value)
        return base64.b64encode(value.to_bytes(4, "big")).decode()

    @property
    def field(self) -> str:
        """The request's field that carries it."""
        return f"Checksum{self.name}"


CRC32: Final = Checksum("CRC32", zlib.crc32)
BEST: Final = Checksum("CRC32C", _crc32c) if _crc32c else CRC32
FIELDS: Final = frozenset({"ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256"})


class Checksums:
    """The best one that a service takes, found out by the first upload."""

    def __init__(self, best: Checksum = BEST) -> None:
        self._best = best

    def with_best(self, send: Callable[[Checksum], Answer]) -> Answer:
        """What `send` answers; a service that refuses it is asked with the plain one, and so from then on."""
        best = self._best
        try:
            return send(best)
        except WrongAnswer:
            if best is CRC32:
                raise
        answer = send(CRC32)
        self._best = CRC32
        return answer
