"""Carrying a decision out: a write that Kubernetes refuses holds up nothing else, and the user is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from mend.actions import CreateService, CreateTls, CreateToken, SendStop
from mend.apply import Applier
from mend.kube.client import Json, Resource
from mend.kube.election import Fence, NotLeader
from mend.kube.errors import Forbidden
from mend.kube.events import Regarding
from mend.observation import Observation
from mend.orders import Ack, Order, Stop
from mend.status import RunStatus
from mend.strikebook import StrikeBook

SEEN = Observation(name="clio", namespace="default", uid="uid", generation=1, created_at=0.0, status=RunStatus())
STOP = SendStop(worker=0, pod_uid="pod", attempt=1, reason="rank 1 was killed")


class Api:
    """An API server that refuses to make anything but services."""

    def __init__(self) -> None:
        self.made: list[str] = []

    async def create(self, resource: Resource, namespace: str, body: Mapping[str, Any]) -> Json:
        if resource.plural != "services":
            raise Forbidden(f"POST {resource.plural}", 403, "Forbidden", "exceeded quota")
        self.made.append(resource.plural)
        return dict(body)


class Agents:
    """A pool whose only agent answers when it is allowed to."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.may_answer = asyncio.Event()

    async def send(self, run: object, worker: int, pod_uid: str, order: Order) -> Ack:
        self.orders.append(order)
        await self.may_answer.wait()
        return Ack(accepted=True, attempt=1)


class Recorder:
    """Events that were recorded."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def record(self, regarding: Regarding, type: str, reason: str, message: str) -> None:
        self.events.append((reason, message))


class Scene:
    """An applier among these."""

    def __init__(self, *, leads: bool = True) -> None:
        self.api, self.agents, self.recorder = Api(), Agents(), Recorder()
        fence = Fence(1, 10.0 if leads else 0.0, lambda: 5.0)
        api: Any = self.api
        book = StrikeBook(api, "mend-system", lambda: 0.0, on_change=lambda: None)
        parts: tuple[Any, ...] = (self.api, self.agents, self.recorder, fence, book)
        keep = prune = sweep = lambda *_: None
        self.applier = Applier(*parts, prune=prune, sweep=sweep, keep=keep, wake=lambda run: None)


async def test_a_refused_write_holds_up_no_order_and_no_other_write() -> None:
    """The order goes out and the service is made although the Secret was refused; the refusal is raised in the end."""
    scene = Scene()
    with pytest.raises(Forbidden):
        await scene.applier.act(None, SEEN, (CreateToken(), CreateService(), STOP))
    await asyncio.sleep(0)
    assert scene.agents.orders == [Stop(attempt=1, reason="rank 1 was killed", exit_code=0)]
    assert scene.api.made == ["services"]
    assert scene.recorder.events[0][0] == "Refused"
    assert "exceeded quota" in scene.recorder.events[0][1]


async def test_a_slow_agent_holds_up_nobody() -> None:
    """Acting ends before the agent has answered; the same order is not sent again while it is under way."""
    scene = Scene()
    await scene.applier.act(None, SEEN, (STOP,))
    await scene.applier.act(None, SEEN, (STOP,))
    await asyncio.sleep(0)
    assert len(scene.agents.orders) == 1
    scene.agents.may_answer.set()
    await asyncio.sleep(0.01)
    await scene.applier.act(None, SEEN, (STOP,))
    await asyncio.sleep(0)
    assert len(scene.agents.orders) == 2
    await scene.applier.close()


async def test_nothing_is_done_behind_a_closed_fence() -> None:
    """Who is no longer the leader gives no order and writes nothing."""
    scene = Scene(leads=False)
    with pytest.raises(NotLeader):
        await scene.applier.act(None, SEEN, (STOP, CreateService()))
    await asyncio.sleep(0)
    assert not scene.agents.orders
    assert not scene.api.made


async def test_a_certificate_is_made_in_a_secret_of_its_own() -> None:
    """It is the run's, and holds key and certificate and nothing of the token."""
    scene = Scene()
    made: list[Mapping[str, Any]] = []

    async def create(resource: Resource, namespace: str, body: Mapping[str, Any]) -> Json:
        made.append(body)
        return dict(body)

    scene.api.create = create  # type: ignore[method-assign]
    await scene.applier.act(None, SEEN, (CreateTls(),))
    (secret,) = made
    assert secret["metadata"]["name"] == "clio-mend-tls"
    (pem,) = secret["stringData"].values()
    assert pem.count("-----BEGIN") == 2
