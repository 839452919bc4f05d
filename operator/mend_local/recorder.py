"""Events about pods and nodes, posted in the background; repeated ones are counted, and none holds anything up."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any, Final

from mend_local.client import Api, ApiError, ApiUnreachable
from mend_local.podstatus import now_rfc3339

Json = dict[str, Any]
log = logging.getLogger(__name__)

_QUEUE_LENGTH: Final = 1000
_REMEMBERED: Final = 500


class Recorder:
    """Posts Events in the order they are told; when the server is away they are dropped, as Kubernetes does."""

    def __init__(self, api: Api, component: str) -> None:
        self._api = api
        self._component = component
        self._queue: asyncio.Queue[Json] = asyncio.Queue(_QUEUE_LENGTH)
        self._posted: dict[tuple[str, str, str], Json] = {}

    def tell(self, about: Json, kind: str, reason: str, message: str) -> None:
        """An event about an object; `kind` is Normal or Warning."""
        metadata, now = about["metadata"], now_rfc3339()
        namespace = metadata.get("namespace") or "default"
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": about.get("apiVersion", "v1"),
                "kind": about.get("kind", "Pod"),
                "name": metadata["name"],
                "namespace": metadata.get("namespace", ""),
                "uid": metadata["uid"],
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.debug("event dropped: %s %s", reason, message)

    async def run(self) -> None:
        """Post what is told until cancelled."""
        while True:
            event = await self._queue.get()
            try:
                await self._post(event)
            except (ApiError, ApiUnreachable) as error:
                log.debug("event dropped: %s", error)

    async def _post(self, event: Json) -> None:
        collection = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
        key = (event["involvedObject"]["uid"], event["reason"], event["message"])
        if before := self._posted.get(key):
            count = {"count": before["count"] + 1, "lastTimestamp": event["lastTimestamp"]}
            await self._api.merge(f"{collection}/{before['metadata']['name']}", count)
            before |= count
            return
        await self._api.create(collection, event)
        self._posted[key] = event
        if len(self._posted) > _REMEMBERED:
            del self._posted[next(iter(self._posted))]
