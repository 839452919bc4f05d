"""An address of its own for each pod, in 127.64.0.0/10, so that every pod may listen on the same port."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from typing import Final

_FIRST: Final = int(ipaddress.IPv4Address("127.64.0.1"))
_COUNT: Final = 2**22 - 2
SHARED: Final = "127.0.0.1"


def addresses_work() -> bool:
    """Whether this system lets a program listen anywhere in 127.0.0.0/8 (Linux does, macOS does not)."""
    with socket.socket() as probe:
        try:
            probe.bind((str(ipaddress.IPv4Address(_FIRST)), 0))
        except OSError:
            return False
    return True


class Addresses:
    """Hands out addresses by the pod's uid; where none can be had, every pod gets 127.0.0.1.

    Each is reserved on the whole machine by an abstract socket of that name, which the kernel frees when we die: two
    clusters never give the same one.
    """

    def __init__(self) -> None:
        self.separate = addresses_work()
        self._held: dict[str, tuple[str, socket.socket]] = {}

    def of(self, uid: str) -> str:
        """The pod's address; the same as long as it lives, and again after a restart if nobody took it."""
        if not self.separate:
            return SHARED
        if uid not in self._held:
            self._held[uid] = _reserve(uid)
        return self._held[uid][0]

    def free(self, uid: str) -> None:
        """The pod is gone."""
        if held := self._held.pop(uid, None):
            held[1].close()

    def close(self) -> None:
        """Free them all."""
        for uid in list(self._held):
            self.free(uid)


def _reserve(uid: str) -> tuple[str, socket.socket]:
    start = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big")
    for attempt in range(_COUNT):
        address = str(ipaddress.IPv4Address(_FIRST + (start + attempt) % _COUNT))
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lock.bind(f"\0mend-local-pod-{address}")
        except OSError:
            lock.close()
            continue
        return address, lock
    raise RuntimeError("all addresses in 127.64.0.0/10 are taken: end other local clusters with `mend local down`")
