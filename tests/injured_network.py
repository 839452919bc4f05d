"""Network namespaces, one a worker, on one bridge; what is between the workers can be cut, the way to them cannot."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


class Network:
    """Workers 0..n-1 at addresses of a /24 of their own, all reachable from here and from each other until cut."""

    def __init__(self, workers: int) -> None:
        self._tag = f"{os.getpid() % 0xFFFFF:x}"  # interface names may have 15 characters
        self._subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self._workers = workers

    @classmethod
    @contextlib.contextmanager
    def of(cls, workers: int) -> Iterator[Network]:
        """A network that is gone afterwards; skips the test where none can be made."""
        if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
            pytest.skip("needs root, ip (iproute2) and nsenter to make network namespaces")
        network = cls(workers)
        try:
            network._build()
            yield network
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces and a bridge: {error.stderr.decode().strip()}")
        finally:
            network._remove()

    def address(self, worker: int) -> str:
        """Where this worker's agent listens."""
        return f"{self._subnet}.{worker + 2}"

    def enter(self, worker: int) -> list[str]:
        """A command that runs another in this worker's namespace, and becomes it."""
        return ["nsenter", f"--net=/run/netns/{self._space(worker)}"]

    def cut(self) -> None:
        """No packet passes between workers any more; nobody is told."""
        self._isolate("on")

    def mend(self) -> None:
        """They reach each other again."""
        self._isolate("off")

    def _isolate(self, switch: str) -> None:
        for worker in range(self._workers):
            _ip("link", "set", self._port(worker), "type", "bridge_slave", "isolated", switch)

    def _build(self) -> None:
        bridge = f"mb{self._tag}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{self._subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for worker in range(self._workers):
            space, port = self._space(worker), self._port(worker)
            _ip("netns", "add", space)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", port, "master", bridge, "up")
            _ip("-n", space, "address", "add", f"{self.address(worker)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for worker in range(self._workers):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", self._space(worker))  # the pair of interfaces goes with it
        with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
            _ip("link", "delete", f"mb{self._tag}")

    def _space(self, worker: int) -> str:
        return f"mend-{self._tag}-{worker}"

    def _port(self, worker: int) -> str:
        return f"mv{self._tag}x{worker}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
