"""The nodes that one kubelet stands for: registered, kept alive by heartbeats, lost and found on command."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from mend_local import nodes
from mend_local.addresses import SHARED
from mend_local.client import Api, ApiError, ApiUnreachable, insist


class NodeKeeper:
    """Reports the nodes `names`, with `notes` as their annotations, until they are lost."""

    def __init__(self, api: Api, names: Sequence[str], notes: Mapping[str, str], heartbeat_seconds: float) -> None:
        self.names = tuple(names)
        self.lost: set[str] = set()
        self._api = api
        self._notes = dict(notes)
        self._heartbeat_seconds = heartbeat_seconds
        self._partitioning = asyncio.Lock()  # one partition begins or ends at a time, in the order asked for

    async def register(self) -> None:
        """Make the Nodes, ready for pods."""
        for name in self.names:
            await self._api.apply("/api/v1/nodes", nodes.node_object(name, self._notes))
            await self._write(name, lost=False)

    async def run(self) -> None:
        """Renew the leases until cancelled."""
        while True:
            for name in self.names:
                if name not in self.lost:
                    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
                    with contextlib.suppress(ApiError, ApiUnreachable):  # the next one is soon
                        await self._api.apply(nodes.LEASES, nodes.lease_object(name, now))
            await asyncio.sleep(self._heartbeat_seconds)

    async def lose(self, name: str) -> None:
        """From now on nothing is heard from the node, and the API server shows it as Kubernetes does after a while."""
        async with self._partitioning:
            self.lost.add(name)
            await insist(lambda: self._write(name, lost=True), lambda: False)

    async def find(self, name: str) -> None:
        """It reports again."""
        async with self._partitioning:
            await insist(lambda: self._write(name, lost=False), lambda: False)
            self.lost.discard(name)

    async def _write(self, name: str, *, lost: bool) -> None:
        path = f"/api/v1/nodes/{name}"
        now = (await self._api.get(path))["spec"].get("taints") or []
        taints = nodes.lost_taints(now) if lost else nodes.live_taints(now)
        await self._api.merge(path, {"spec": {"taints": taints}})
        status = nodes.lost_status() if lost else nodes.live_status(SHARED)
        await self._api.merge(f"{path}/status", {"status": status})
