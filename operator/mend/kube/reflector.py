"""Keeps a local copy of a collection of objects true: a list, then a watch, and again whenever that breaks.

A watch resumes at the last version seen. `Gone`, and any answer that does not say that the server is merely busy, leads
to a fresh list, whose differences to the copy are told as if they had been watched. Trouble is met with growing delays.
"""

from __future__ import annotations

import asyncio
import logging
import random as _random
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from mend.backoff import Backoff
from mend.kube.client import Json, KubeClient, Resource, WatchEvent
from mend.kube.errors import ApiError, TooManyRequests, Unreachable
from mend.kube.index import Index, Key, key_of, uid_of, version_of

log = logging.getLogger(__name__)

OnChange = Callable[[Json | None, Json | None], None]

RETRY_BACKOFF: Final = Backoff(base_seconds=0.05, ceiling_seconds=3.0)
HEALTHY_SECONDS: Final = 2.0  # a watch that lived this long ends a row of failures
WATCH_SECONDS: Final = 60.0


@dataclass(slots=True)
class WatchHealth:
    """How well the copy is kept; `last_contact_at` is by the reflector's clock, None before the first list."""

    lists: int = 0
    watches: int = 0
    events: int = 0
    errors: int = 0
    failures_in_row: int = 0
    last_contact_at: float | None = None  # the last list, event or bookmark, or orderly end of a watch
    last_error: str = ""

    @property
    def relists(self) -> int:
        """Lists beyond the first."""
        return max(self.lists - 1, 0)


class Reflector:
    """Watches one collection. `run` never returns by itself; `synced` is set once the first list is in the index.

    `on_change(old, new)` is called after the index has changed: `(None, new)` added, `(old, new)` modified,
    `(old, None)` deleted. An object made anew under its old name is told as deleted, then added.
    """

    def __init__(
        self,
        client: KubeClient,
        resource: Resource,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        on_change: OnChange = lambda old, new: None,
        page_size: int = 500,
        watch_seconds: float = WATCH_SECONDS,
        backoff: Backoff = RETRY_BACKOFF,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.resource = resource
        self.index = Index()
        self.synced = asyncio.Event()
        self.health = WatchHealth()
        self._client = client
        self._namespace = namespace
        self._selectors = {"label_selector": label_selector, "field_selector": field_selector}
        self._on_change = on_change
        self._page_size = page_size
        self._watch_seconds = watch_seconds
        self._backoff = backoff
        self._clock = clock
        self._random = random
        self._version: str | None = None  # None: list first

    async def run(self) -> None:
        """Keeps the copy true until cancelled."""
        while True:
            began = self._clock()
            try:
                if self._version is None:
                    await self._list()
                await self._watch(self._version or "")
            except ApiError as error:
                self._note_trouble(error, lived=self._clock() - began)
            else:
                if self._clock() - began >= min(HEALTHY_SECONDS, self._watch_seconds / 2):
                    self.health.failures_in_row = 0
                    continue
                self.health.failures_in_row += 1  # a server that hangs up at once must not be called in a loop
            await asyncio.sleep(self._backoff.seconds(self.health.failures_in_row, self._random))

    def silent_seconds(self) -> float:
        """How long nothing was heard; infinite before the first list."""
        heard = self.health.last_contact_at
        return float("inf") if heard is None else self._clock() - heard

    # ------------------------------------------------------------ talking
    async def _list(self) -> None:
        found: dict[Key, Json] = {}
        version = ""
        pages = self._client.list_pages(
            self.resource, self._namespace, page_size=self._page_size, attempts=1, **self._selectors
        )
        async for page in pages:
            found.update((key_of(item), item) for item in page.items)
            version = page.resource_version
        self.health.lists += 1
        self._contact()
        self._replace(found)
        self._version = version
        self.synced.set()

    async def _watch(self, version: str) -> None:
        self.health.watches += 1
        timeout = self._watch_seconds * (0.75 + self._random() / 2)  # many watches must not end at once
        events = self._client.watch(
            self.resource, self._namespace, resource_version=version, timeout_seconds=timeout, **self._selectors
        )
        async with aclosing(events):
            async for event in events:
                self._contact()
                self._take(event)
                self._version = version_of(event.object)
        self._contact()

    def _note_trouble(self, error: ApiError, lived: float) -> None:
        health = self.health
        health.errors += 1
        health.failures_in_row = 1 if lived >= HEALTHY_SECONDS else health.failures_in_row + 1
        if health.failures_in_row == 1 or health.last_error != str(error):
            log.warning("watch of %s broke: %s", self.resource.plural, error)
        health.last_error = str(error)
        if not isinstance(error, Unreachable | TooManyRequests):
            self._version = None

    def _contact(self) -> None:
        self.health.last_contact_at = self._clock()

    # ------------------------------------------------------------ the copy
    def _take(self, event: WatchEvent) -> None:
        if event.type == "BOOKMARK":
            return
        self.health.events += 1
        if event.type == "DELETED":
            self._remove(event.object)
        else:
            self._put(event.object)

    def _replace(self, found: dict[Key, Json]) -> None:
        """The difference between the copy and a fresh list, told as changes."""
        for old in self.index.values():
            if key_of(old) not in found:
                self._remove(old)
        for new in found.values():
            self._put(new)

    def _put(self, new: Json) -> None:
        old = self.index.get(*key_of(new))
        if old is not None and uid_of(old) != uid_of(new):
            self._remove(old)
            old = None
        if old is not None and version_of(old) == version_of(new):
            return
        self.index.put(new)
        self._on_change(old, new)

    def _remove(self, gone: Json) -> None:
        if self.index.remove(*key_of(gone)) is not None:
            self._on_change(gone, None)


async def all_synced(reflectors: Iterable[Reflector]) -> None:
    """Waits until every one of them has its first list."""
    for reflector in reflectors:
        await reflector.synced.wait()
