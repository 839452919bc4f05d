"""A copy of one collection of the API server, kept current through lost connections and forgotten versions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from mend_local.client import Api, ApiError, ApiUnreachable, sleep_backed_off

Json = dict[str, Any]
log = logging.getLogger(__name__)


class Mirror:
    """Holds the newest known object by uid, and calls `on_change(uid)` for each that came, changed or went."""

    def __init__(self, api: Api, path: str, on_change: Callable[[str], None]) -> None:
        self.objects: dict[str, Json] = {}
        self.synced = asyncio.Event()
        self._api = api
        self._path = path
        self._on_change = on_change

    async def run(self) -> None:
        """List, watch, and begin again when the watch breaks; runs until it is cancelled."""
        failures, version = 0, ""
        while True:
            try:
                if not version:
                    version = await self._list()
                async for event in self._api.watch(self._path, version):
                    failures = 0
                    version = event.object["metadata"]["resourceVersion"]
                    if event.type != "BOOKMARK":
                        self._take(event.type, event.object)
            except ApiError as error:
                version = ""  # too old (410), or refused: only a new list is sure
                log.info("watch of %s: %s", self._path, error)
            except ApiUnreachable as error:
                log.log(logging.WARNING if failures == 3 else logging.DEBUG, "%s", error)
            failures += 1  # also for a watch that the server ended: one that brings nothing is not repeated at once
            await sleep_backed_off(failures - 1)

    async def _list(self) -> str:
        items, version = await self._api.list(self._path)
        found = {each["metadata"]["uid"]: each for each in items}
        changed = [uid for uid, each in found.items() if self.objects.get(uid) != each]
        gone = [uid for uid in self.objects if uid not in found]
        self.objects = found
        self.synced.set()
        for uid in gone + changed:
            self._on_change(uid)
        return version

    def _take(self, kind: str, each: Json) -> None:
        uid = each["metadata"]["uid"]
        if kind == "DELETED":
            self.objects.pop(uid, None)
        else:
            self.objects[uid] = each
        self._on_change(uid)
