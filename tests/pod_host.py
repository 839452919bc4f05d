"""Runs pods without a cluster: a host that remembers what pods tell, and builders of pods that read aloud."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mend_local.containers import log_path
from mend_local.memory import MemoryGroups
from mend_local.pods import PodRunner, PodSettings
from mend_local.podspec import Source
from mend_local.processes import end_owned, owned_by

Json = dict[str, Any]


async def eventually(true: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait until a condition holds; fail with what was awaited."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not true():
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


def python(code: str, name: str = "main", **more: Any) -> Json:
    """A container that runs a line of Python."""
    return {"name": name, "image": "python", "command": [sys.executable, "-u", "-c", code], **more}


def shell(script: str, name: str = "main", **more: Any) -> Json:
    """A container that runs a shell script; much quicker to start than Python."""
    return {"name": name, "image": "busybox", "command": ["sh", "-c", script], **more}


def a_pod(*containers: Json, name: str = "worker-0", policy: str = "Never", **spec: Any) -> Json:
    """A pod as the API server shows it, with a uid of its own."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": str(uuid.uuid4()),
            "labels": {"mend.dev/worker": "0"},
            "annotations": {"note": "kept"},
        },
        "spec": {"containers": list(containers), "restartPolicy": policy, "nodeName": "mend-local-0", **spec},
    }


class Host:
    """A kubelet's part as a pod sees it, without a cluster."""

    def __init__(self, root: Path, settings: PodSettings, memory: MemoryGroups) -> None:
        self.settings = settings
        self.memory = memory
        self.cluster_id = uuid.uuid4().hex[:12]
        self.root = root
        self.seen: list[Json] = []  # every status in order
        self.events: list[tuple[str, str]] = []
        self.secrets: dict[str, dict[str, bytes]] = {}

    def changed(self, pod: PodRunner) -> None:
        self.seen.append(pod.status)

    def event(self, pod: Json, kind: str, reason: str, message: str) -> None:
        self.events.append((reason, message))

    async def fetch(self, source: Source, namespace: str) -> Mapping[str, bytes] | None:
        return self.secrets.get(source.name)

    def run(self, pod: Json, ip: str = "127.0.0.1") -> PodRunner:
        """Start a pod."""
        return PodRunner(pod, self, root=self.root / pod["metadata"]["uid"], ip=ip, host_ip="127.0.0.1")

    def log(self, runner: PodRunner, container: str = "main") -> list[str]:
        """The lines that a container printed, without their times."""
        path = log_path(self.root / runner.uid, container)
        text = path.read_text() if path.exists() else ""
        return [line.split(" ", 1)[1] for line in text.splitlines()]

    def processes(self) -> list[int]:
        """Every process that pods of this host left, whatever became of their parents."""
        return [each.identity.pid for each in owned_by(f"{self.cluster_id}/")]


@asynccontextmanager
async def a_host(root: Path, *, memory: MemoryGroups | None = None, **settings: Any) -> AsyncIterator[Host]:
    """A host whose pods are all gone afterwards."""
    host = Host(root, PodSettings(**settings), memory or MemoryGroups(None, why_not="not asked for"))
    try:
        yield host
    finally:
        await asyncio.to_thread(end_owned, f"{host.cluster_id}/")
