"""The book of strikes in its ConfigMap, on a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kube_server import NAMESPACE, Cluster, a_cluster
from mend.incidents import Strike
from mend.kube.client import CONFIG_MAPS
from mend.kube.errors import ApiError
from mend.strikebook import BOOK_NAME, FIELD, StrikeBook, read

NOW = 1_000_000.0


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A fresh server."""
    async with a_cluster(tmp_path) as cluster:
        yield cluster


def a_book(cluster: Cluster, changed: asyncio.Event | None = None) -> StrikeBook:
    """A book, as one controller has it."""
    told = changed or asyncio.Event()
    return StrikeBook(cluster.client, NAMESPACE, lambda: NOW, on_change=told.set)


def a_strike(number: int, node: str = "node-1", expires_at: float = NOW + 60) -> Strike:
    """A strike of a run of its own."""
    return Strike(
        id=f"r{number}", node=node, run=f"team/r{number}", reason="ill", struck_at=NOW - number, expires_at=expires_at
    )


async def stored(cluster: Cluster) -> list[str]:
    """Ids of the strikes that the API server holds."""
    return [each.id for each in read(await cluster.client.get(CONFIG_MAPS, NAMESPACE, BOOK_NAME))]


async def test_a_strike_survives_the_controller(cluster: Cluster) -> None:
    """It is made with the first strike; what is entered twice is there once, and a new controller's watch shows it."""
    await a_book(cluster).strike(a_strike(1))
    version = (await cluster.client.get(CONFIG_MAPS, NAMESPACE, BOOK_NAME))["metadata"]["resourceVersion"]
    await a_book(cluster).strike(a_strike(1))
    assert (await cluster.client.get(CONFIG_MAPS, NAMESPACE, BOOK_NAME))["metadata"]["resourceVersion"] == version
    changed = asyncio.Event()
    successor = a_book(cluster, changed)
    watching = asyncio.create_task(successor.reflector.run())
    await asyncio.wait_for(changed.wait(), 30)
    assert successor.strikes() == (a_strike(1),)
    assert successor.by_node() == {"node-1": 1}
    changed.clear()
    await successor.lift(("r1",))
    await asyncio.wait_for(changed.wait(), 30)
    assert [each.lifted for each in successor.strikes()] == [True]
    assert successor.by_node() == {}
    watching.cancel()


async def test_two_at_once_lose_nothing(cluster: Cluster) -> None:
    """Each write says what it was based on, and is done again on what the other has made of it."""
    await a_book(cluster).strike(a_strike(1))
    await asyncio.gather(a_book(cluster).strike(a_strike(2, "node-2")), a_book(cluster).strike(a_strike(3, "node-3")))
    assert set(await stored(cluster)) == {"r1", "r2", "r3"}


async def test_what_has_expired_goes_with_the_next_write(cluster: Cluster) -> None:
    """The book does not grow for ever."""
    await a_book(cluster).strike(a_strike(1, expires_at=NOW + 1))
    later = StrikeBook(cluster.client, NAMESPACE, lambda: NOW + 30, on_change=lambda: None)
    await later.strike(a_strike(2))
    assert await stored(cluster) == ["r2"]


async def test_a_spoilt_book_shuns_nobody(cluster: Cluster) -> None:
    """What nobody can read counts for nothing, and is written over by the next strike."""
    body = {"metadata": {"name": BOOK_NAME, "namespace": NAMESPACE}, "data": {FIELD: '[{"id": 7}]'}}
    await cluster.client.create(CONFIG_MAPS, NAMESPACE, {"apiVersion": "v1", "kind": "ConfigMap", **body})
    assert await stored(cluster) == []
    await a_book(cluster).strike(a_strike(1))
    assert await stored(cluster) == ["r1"]


async def test_a_refusal_is_an_error_of_the_api(cluster: Cluster) -> None:
    """Whoever acts is told, and tries again later."""
    await cluster.misbehave(errors=100, errorCode=403, resource="configmaps")
    with pytest.raises(ApiError):
        await a_book(cluster).strike(a_strike(1))
