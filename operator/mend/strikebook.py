"""Keeps the book of strikes in one ConfigMap beside the controller: watched as a whole, written with its version.

It survives controllers and runs, and people can read it: `kubectl -n mend-system get configmap mend-strikes -o yaml`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import msgspec

from mend import strikes
from mend.incidents import Strike
from mend.kube.client import CONFIG_MAPS, Json, KubeClient
from mend.kube.errors import AlreadyExists, Conflict, NotFound
from mend.kube.reflector import Reflector

log = logging.getLogger(__name__)

BOOK_NAME: Final = "mend-strikes"
FIELD: Final = "strikes"  # of the ConfigMap: a JSON list
TRIES: Final = 3

_decode = msgspec.json.Decoder(tuple[Strike, ...]).decode


class StrikeBook:
    """The strikes of all runs. `on_change` is called when the book has changed, by whomever."""

    def __init__(
        self, client: KubeClient, namespace: str, clock: Callable[[], float], *, on_change: Callable[[], None]
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._clock = clock
        self.reflector = Reflector(
            client,
            CONFIG_MAPS,
            namespace=namespace,
            field_selector=f"metadata.name={BOOK_NAME}",  # so that a right to this very name is enough
            on_change=lambda old, new: on_change(),
        )

    def strikes(self) -> tuple[Strike, ...]:
        """The book as watched."""
        return read(self.reflector.index.get(self._namespace, BOOK_NAME))

    def by_node(self) -> dict[str, int]:
        """How many strikes count against each node that has any, now."""
        book, now = self.strikes(), self._clock()
        found = {node: len(strikes.counting(book, node, now)) for node in sorted({each.node for each in book})}
        return {node: count for node, count in found.items() if count}

    async def strike(self, strike: Strike) -> None:
        """Enters a strike; one that is there already changes nothing. Raises `ApiError`."""
        await self._rewrite(lambda book: strikes.struck(book, strike))

    async def lift(self, ids: tuple[str, ...]) -> None:
        """Lets these strikes count no more. Raises `ApiError`."""
        await self._rewrite(lambda book: strikes.lifted(book, ids))

    async def _rewrite(self, change: Callable[[tuple[Strike, ...]], tuple[Strike, ...]]) -> None:
        """Reads, changes and writes the book, again if somebody else has written it meanwhile."""
        for left in reversed(range(TRIES)):
            try:
                await self._rewrite_once(change)
                return
            except (Conflict, AlreadyExists):
                if left == 0:
                    raise

    async def _rewrite_once(self, change: Callable[[tuple[Strike, ...]], tuple[Strike, ...]]) -> None:
        try:
            found: Json | None = await self._client.get(CONFIG_MAPS, self._namespace, BOOK_NAME)
        except NotFound:
            found = None
        before = read(found)
        after = strikes.kept(change(before), self._clock())
        if after == before:
            return
        data = {FIELD: msgspec.json.encode(after).decode()}
        if found is not None:
            await self._client.replace(CONFIG_MAPS, {**found, "data": data})
            return
        meta = {"name": BOOK_NAME, "namespace": self._namespace, "labels": {"app.kubernetes.io/managed-by": "mend"}}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        await self._client.create(CONFIG_MAPS, self._namespace, body)


def read(book: Json | None) -> tuple[Strike, ...]:
    """The strikes in a ConfigMap. A spoilt one counts for none: no node is shunned for what nobody can read."""
    text = ((book or {}).get("data") or {}).get(FIELD)
    if not text:
        return ()
    try:
        return _decode(text)
    except msgspec.MsgspecError as error:
        log.warning("ConfigMap %s, data.%s: %s; delete the ConfigMap to begin a new book", BOOK_NAME, FIELD, error)
        return ()
