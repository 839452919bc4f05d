"""An agent's HTTP face without ranks behind it: it says what a test tells it to, true or not.

`python fake_agent.py WORKER SECONDS` is one in a process of its own, with a heartbeat every so many seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from mend.dial import Target
from mend.heartbeats import AgentState, Heartbeat, RankReport
from mend.orders import Ack, Order, decode_order
from mend.protocol import ORDERS_PATH, STREAM_PATH, Message, encode

TOKEN = "the run's token"


def a_heartbeat(worker: int = 0, attempt: int = 1, sequence: int = 1, ranks: int = 2, **facts: Any) -> Heartbeat:
    """A running worker whose ranks have done a step."""
    return Heartbeat(
        worker=worker,
        attempt=attempt,
        sequence=sequence,
        agent_id=facts.pop("agent_id", "agent-1"),
        state=facts.pop("state", AgentState.RUNNING),
        ranks=facts.pop("reports", tuple(a_rank(rank) for rank in range(ranks))),
        **facts,
    )


def a_rank(rank: int = 0, steps_done: int = 1, step_seconds: float = 0.5, **facts: Any) -> RankReport:
    """A rank that has done `steps_done` steps in this attempt."""
    return RankReport(
        rank=rank, pid=100 + rank, step=steps_done - 1, steps_done=steps_done, step_seconds=step_seconds, **facts
    )


class FakeAgent:
    """Serves streams and orders on a loopback port that stays the same over `stop` and `start`."""

    def __init__(self, worker: int = 0, token: str = TOKEN) -> None:
        self.worker = worker
        self.token = token
        self.port = 0
        self.streams: set[web.StreamResponse] = set()
        self.dials = 0
        self.orders: list[Order] = []
        self.greeting: tuple[Message | bytes, ...] = (a_heartbeat(worker),)
        self.answer: Callable[[Order], tuple[int, bytes]] = lambda order: (
            200,
            encode(Ack(accepted=True, attempt=order.attempt)),
        )
        self.stalls = False  # accepts requests and never answers
        self._runner: web.AppRunner | None = None

    @property
    def target(self) -> Target:
        """Where and how to reach it."""
        return Target(worker=self.worker, pod_uid="pod-uid", ip="127.0.0.1", port=self.port, token=TOKEN)

    async def start(self) -> None:
        """Listens, on the port of before if there was one."""
        app = web.Application()
        app.router.add_get(STREAM_PATH, self._stream)
        app.router.add_post(ORDERS_PATH, self._order)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Dies: the port is closed and every connection cut."""
        runner, self._runner = self._runner, None
        if runner is not None:
            self.cut()
            await runner.cleanup()

    def cut(self) -> None:
        """Cuts every open stream."""
        for stream in self.streams:
            assert stream._req is not None
            if stream._req.transport is not None:
                stream._req.transport.abort()

    async def say(self, *messages: Message | bytes) -> None:
        """Sends lines on every open stream; bytes go out as they are."""
        for stream in tuple(self.streams):
            for message in messages:
                await stream.write(message if isinstance(message, bytes) else encode(message) + b"\n")

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self.dials += 1
        await self._let_in(request)
        response = web.StreamResponse()
        await response.prepare(request)
        self.streams.add(response)
        try:
            for message in self.greeting:
                await response.write(message if isinstance(message, bytes) else encode(message) + b"\n")
            await asyncio.Event().wait()
        finally:
            self.streams.discard(response)
        return response

    async def _order(self, request: web.Request) -> web.Response:
        await self._let_in(request)
        order = decode_order(await request.read())
        self.orders.append(order)
        status, body = self.answer(order)
        return web.Response(status=status, body=body)

    async def _let_in(self, request: web.Request) -> None:
        if self.stalls:
            await asyncio.Event().wait()
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            raise web.HTTPUnauthorized()


@asynccontextmanager
async def an_agent(worker: int = 0, token: str = TOKEN) -> AsyncIterator[FakeAgent]:
    """A fake agent that listens, and is stopped at the end."""
    agent = FakeAgent(worker, token)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.stop()


async def _beat(worker: int, every_seconds: float) -> None:
    """Serves heartbeats for ever; the first line of the output is the port."""
    agent = FakeAgent(worker)
    await agent.start()
    print(agent.port, flush=True)
    for sequence in itertools.count(2):
        await asyncio.sleep(every_seconds)
        agent.greeting = (a_heartbeat(worker, sequence=sequence),)
        await agent.say(*agent.greeting)


if __name__ == "__main__":
    asyncio.run(_beat(worker=int(sys.argv[1]), every_seconds=float(sys.argv[2])))
