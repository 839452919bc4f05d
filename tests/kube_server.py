"""The laptop-sized API server inside the test's own event loop, with a client, and misbehaviour on command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from mend.kube.client import KubeClient
from mend_local.apiserver import ApiServer

NAMESPACE = "default"


@dataclass(slots=True)
class Cluster:
    """A server that listens, and an admin's client for it."""

    server: ApiServer
    kubeconfig: Path
    client: KubeClient

    async def misbehave(self, **faults: Any) -> None:
        """Replaces the faults in force; without any, all are lifted."""
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.server.admin_token}"}) as session,
            session.put(f"{self.server.url}/mend-local/faults", json=faults, ssl=False) as answer,
        ):
            assert answer.ok, await answer.text()

    async def restart(self, downtime: asyncio.Event | None = None) -> None:
        """Stops the server and starts it again on the same port, after `downtime` if given."""
        await self.server.stop()
        if downtime is not None:
            await downtime.wait()
        self.server = ApiServer(self.server.state_dir, port=self.server.port)
        await self.server.start()


@asynccontextmanager
async def a_cluster(directory: Path, **settings: Any) -> AsyncIterator[Cluster]:
    """A fresh cluster on a free port; `settings` are those of `ApiServer`."""
    server = ApiServer(directory / "state", **settings)
    await server.start()
    kubeconfig = server.write_kubeconfig(directory / "kubeconfig")
    client = await KubeClient.from_kubeconfig(str(kubeconfig))
    cluster = Cluster(server, kubeconfig, client)
    try:
        yield cluster
    finally:
        await client.close()
        await cluster.server.stop()


def a_secret(name: str, *, labels: dict[str, str] | None = None, **strings: str) -> dict[str, Any]:
    """The smallest object there is."""
    meta = {"name": name, "namespace": NAMESPACE, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": strings}
