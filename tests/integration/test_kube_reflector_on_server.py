"""The reflector on a real server: drops, forgotten history, outages, freezes; the copy is true in the end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kube_server import NAMESPACE, Cluster, a_cluster, a_secret
from mend.backoff import Backoff
from mend.kube import client as client_module
from mend.kube.client import SECRETS, Json
from mend.kube.errors import ApiError
from mend.kube.reflector import Reflector
from waiting import eventually


class Watched:
    """A reflector of the namespace's secrets, and how often each name was told as added and deleted."""

    def __init__(self, cluster: Cluster, **settings: Any) -> None:
        self.added: list[str] = []
        self.deleted: list[str] = []
        self.reflector = Reflector(
            cluster.client,
            SECRETS,
            namespace=NAMESPACE,
            label_selector="mine",
            on_change=self._note,
            page_size=2,
            **settings,
        )

    def _note(self, old: Json | None, new: Json | None) -> None:
        if old is None and new is not None:
            self.added.append(new["metadata"]["name"])
        if new is None and old is not None:
            self.deleted.append(old["metadata"]["name"])

    def names(self) -> list[str]:
        return sorted(secret["metadata"]["name"] for secret in self.reflector.index)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A fresh server with three secrets of ours and one that is not."""
    async with a_cluster(tmp_path) as cluster:
        for name in ("a", "b", "c"):
            await add(cluster, name)
        await cluster.client.create(SECRETS, NAMESPACE, a_secret("other"))
        yield cluster


@pytest.fixture
async def watched(cluster: Cluster) -> AsyncIterator[Watched]:
    """A reflector that runs and has its first list."""
    watched = Watched(cluster, backoff=Backoff(base_seconds=0.01, ceiling_seconds=0.2))
    task = asyncio.create_task(watched.reflector.run())
    await asyncio.wait_for(watched.reflector.synced.wait(), 30)
    yield watched
    assert not task.done(), task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def add(cluster: Cluster, name: str) -> None:
    """One more secret of ours."""
    await cluster.client.create(SECRETS, NAMESPACE, a_secret(name, labels={"mine": "yes"}))


def identity(obj: Json) -> tuple[str, ...]:
    """What makes two copies equal."""
    return tuple(obj["metadata"][field] for field in ("name", "uid", "resourceVersion"))


async def test_pages_then_changes(cluster: Cluster, watched: Watched) -> None:
    """The paged list and what happens afterwards are all in the copy, told once each."""
    await add(cluster, "d")
    await cluster.client.delete(SECRETS, NAMESPACE, "a")
    await eventually(lambda: watched.names() == ["b", "c", "d"])
    assert (watched.added, watched.deleted) == (["a", "b", "c", "d"], ["a"])
    secret = watched.reflector.index.get(NAMESPACE, "b")
    assert secret is not None
    assert watched.reflector.index.by_label("mine", "yes", NAMESPACE)


async def test_dropped_watches_lose_nothing(cluster: Cluster, watched: Watched) -> None:
    """However often the watch is cut, it resumes where it was: no list, no change lost or told twice."""
    for number in range(5):
        await cluster.misbehave(dropWatches=True)
        await add(cluster, f"n{number}")
    await eventually(lambda: len(watched.reflector.index) == 8)
    assert len(watched.added) == 8
    assert watched.reflector.health.relists == 0


async def test_forgotten_history_is_listed_anew(cluster: Cluster, watched: Watched) -> None:
    """After 410 the difference is told: deletions that were never watched, too."""
    await cluster.restart()
    await cluster.client.delete(SECRETS, NAMESPACE, "b")
    await add(cluster, "d")
    await cluster.misbehave(forgetHistory=True, dropWatches=True, expireWatches=2)
    await eventually(lambda: watched.names() == ["a", "c", "d"])
    await eventually(lambda: watched.reflector.health.relists >= 1)
    assert watched.deleted == ["b"]


async def test_a_name_made_anew_during_an_outage(cluster: Cluster, watched: Watched) -> None:
    """Deleted and created again while nobody watched: told as deleted and added, never as a change."""
    uid = watched.reflector.index.get(NAMESPACE, "b")["metadata"]["uid"]  # type: ignore[index]
    await cluster.misbehave(expireWatches=1, dropWatches=True)
    await cluster.client.delete(SECRETS, NAMESPACE, "b")
    await add(cluster, "b")
    await eventually(lambda: watched.reflector.index.get(NAMESPACE, "b")["metadata"]["uid"] != uid)  # type: ignore[index]
    assert watched.deleted == ["b"]
    assert watched.added.count("b") == 2


async def test_an_outage_is_sat_out(cluster: Cluster, watched: Watched) -> None:
    """A server that is down for a while costs a few errors; afterwards the copy follows again."""
    back = asyncio.Event()
    restarting = asyncio.create_task(cluster.restart(downtime=back))
    health = watched.reflector.health
    await eventually(lambda: health.errors >= 5)
    assert watched.names() == ["a", "b", "c"]
    back.set()
    await restarting
    await add(cluster, "d")
    await eventually(lambda: watched.names() == ["a", "b", "c", "d"])
    assert watched.reflector.silent_seconds() < 30


@pytest.mark.parametrize("seed", range(3))
async def test_any_mix_of_faults_leaves_a_true_copy(cluster: Cluster, watched: Watched, seed: int) -> None:
    """Whatever goes wrong in between, in the end the copy equals the server's objects, uids and versions."""
    dice = random.Random(seed)
    faults: list[dict[str, object]] = [
        {},
        {"dropWatches": True},
        {"expireWatches": 1, "dropWatches": True},
        {"forgetHistory": True, "dropWatches": True},
        {"errors": 2, "errorCode": 500, "dropWatches": True},
    ]
    for _ in range(40):
        await cluster.misbehave(**dice.choice(faults))
        name = dice.choice("abcdef")
        with suppress(ApiError):
            if dice.random() < 0.5:
                await add(cluster, name)
            else:
                await cluster.client.delete(SECRETS, NAMESPACE, name)
    await cluster.misbehave()

    def seen() -> set[tuple[str, ...]]:
        return {identity(secret) for secret in watched.reflector.index}

    truth = {identity(one) for one in (await cluster.client.list_all(SECRETS, NAMESPACE, label_selector="mine")).items}
    await eventually(lambda: seen() == truth)
    assert Counter(watched.added) - Counter(watched.deleted) == Counter(watched.names())


async def test_a_frozen_server_is_noticed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that falls silent is given up a little after its time and begun again."""
    monkeypatch.setattr(client_module, "WATCH_GRACE_SECONDS", 0.1)
    watched = Watched(cluster, watch_seconds=1.0)
    task = asyncio.create_task(watched.reflector.run())
    await eventually(watched.reflector.synced.is_set)
    await cluster.misbehave(frozen=True)
    await eventually(lambda: watched.reflector.health.errors >= 1)
    await cluster.misbehave()
    await add(cluster, "d")
    await eventually(lambda: watched.names() == ["a", "b", "c", "d"])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
