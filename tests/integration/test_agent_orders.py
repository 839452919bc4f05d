"""Orders and streams of a real agent: who may give them, which attempt they are for, and what repeats do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from agents_real import STEPS, AgentClient, a_launch, an_agent, at_step, launched, warm
from mend.environment import ENV_HEARTBEAT_SECONDS
from mend.heartbeats import AgentState, Heartbeat, Points, decode_stream
from mend.orders import Ack, Gather, SaveNow, Stop, decode_ack
from mend.protocol import ORDERS_PATH, STREAM_PATH, encode

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentClient]:
    """A warm agent; tests take growing attempts."""
    async with an_agent(["python", STEPS], tmp_path_factory.mktemp("agent")) as client:
        await warm(client)
        yield client


async def next_attempt(client: AgentClient) -> int:
    """An attempt that trains."""
    assert client.heartbeat is not None
    attempt = client.heartbeat.attempt + 10
    await launched(client, attempt)
    await client.until(at_step(1, attempt))
    return attempt


@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer wrong", "token-of-the-run", "Bearer tökén"])
async def test_nobody_gets_in_without_the_token(agent: AgentClient, token: str) -> None:
    """401 for streams and orders alike, without the token or with another."""
    headers = {"Authorization": token} if token else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.get(agent.agent.url + STREAM_PATH) as answer:
            assert answer.status == 401
        async with session.post(agent.agent.url + ORDERS_PATH, data=encode(Stop(attempt=99))) as answer:
            assert answer.status == 401


async def test_nonsense_is_refused_with_a_reason(agent: AgentClient) -> None:
    """A body that is no order gives 400 and an `Ack` that says what is wrong."""
    headers = {"Authorization": "Bearer token-of-the-run"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for body in (b"", b"{}", b'{"type":"lunch","attempt":1}', b'{"type":"stop","attempt":"x"}'):
            async with session.post(agent.agent.url + ORDERS_PATH, data=body) as answer:
                assert answer.status == 400
                assert not decode_ack(await answer.read()).accepted


async def test_an_order_of_an_older_attempt_is_stale(agent: AgentClient) -> None:
    """409 and the agent's own attempt; nothing happens to its ranks."""
    attempt = await next_attempt(agent)
    for order in (
        a_launch(attempt - 1, agent),
        Stop(attempt=attempt - 1),
        Gather(attempt=attempt - 1),
        SaveNow(attempt=attempt - 1),
    ):
        status, answer = await agent.order(order)
        assert status == 409
        assert isinstance(answer, Ack)
        assert (answer.accepted, answer.attempt) == (False, attempt)
    beat = await agent.until(at_step(5, attempt))
    assert all(rank.exit is None for rank in beat.ranks)


async def test_a_repeated_launch_changes_nothing(agent: AgentClient) -> None:
    """The same order twice: accepted twice, the same processes train on."""
    attempt = await next_attempt(agent)
    assert agent.heartbeat is not None
    before = [rank.pid for rank in agent.heartbeat.ranks]
    await launched(agent, attempt)
    beat = await agent.until(at_step(10, attempt))
    assert [rank.pid for rank in beat.ranks] == before


async def test_a_stopped_attempt_never_starts_again(agent: AgentClient) -> None:
    """After `stop`, launches up to that attempt are refused, even if they come late; the next one is taken."""
    attempt = await next_attempt(agent)
    await agent.order(Stop(attempt=attempt + 1))
    beat = await agent.until(lambda beat: beat.state is AgentState.IDLE)
    assert beat.ranks == ()
    status, answer = await agent.order(a_launch(attempt + 1, agent))
    assert status == 200
    assert isinstance(answer, Ack)
    assert not answer.accepted
    assert "stopped" in answer.reason
    await launched(agent, attempt + 2)
    await agent.until(at_step(1, attempt + 2))


async def test_a_wish_for_a_save_reaches_every_rank(agent: AgentClient) -> None:
    """`save-now` makes the ranks save at the end of a step, and train on."""
    attempt = await next_attempt(agent)
    status, answer = await agent.order(SaveNow(attempt=attempt))
    assert status == 200
    assert isinstance(answer, Ack)
    assert answer.accepted
    await agent.until(lambda _: agent.agent.output.count(f"[attempt {attempt} rank 1] saved at step") > 0)
    await agent.until(at_step(agent.heartbeat.ranks[0].step + 2 if agent.heartbeat else 0, attempt))


async def test_a_controller_that_comes_late_gets_the_whole_curve(agent: AgentClient) -> None:
    """The ranks train on without a controller, and a new stream starts with every point of the attempt."""
    attempt = await next_attempt(agent)
    await agent.until(at_step(20, attempt))
    headers = {"Authorization": "Bearer token-of-the-run"}
    steps: list[int] = []
    async with (
        aiohttp.ClientSession(headers=headers, read_bufsize=1 << 20) as session,
        session.get(agent.agent.url + STREAM_PATH) as stream,
        asyncio.timeout(30),
    ):
        async for line in stream.content:
            message = decode_stream(line)
            if isinstance(message, Points) and message.attempt == attempt:
                steps.extend(point.step for point in message.points)
            if len(steps) > 30:
                break
    assert steps == list(range(len(steps)))


async def test_a_standstill_is_told_long_before_a_heartbeat_is_due(tmp_path: Path) -> None:
    """Of ranks that have not marked for longer than a step takes, several heartbeats within one interval tell so."""
    interval = {ENV_HEARTBEAT_SECONDS: "3", "STEP_SECONDS": "0.05"}
    async with an_agent(["python", STEPS], tmp_path, env=interval) as client:
        await warm(client)
        await launched(client)
        beat = await client.until(at_step(10))
        heard = len(client.lines)
        os.kill(beat.ranks[0].pid, signal.SIGSTOP)
        await client.until(lambda beat: silence(beat) > 2.0)
        told = [silence(line) for _, line in client.lines[heard:] if isinstance(line, Heartbeat)]
        assert len([seconds for seconds in told if 0.05 < seconds <= 2.0]) >= 3, told


def silence(beat: Heartbeat) -> float:
    """Seconds for which no rank has marked."""
    return min(rank.progress_seconds for rank in beat.ranks)


async def test_a_controller_that_does_not_read_stops_nobody(agent: AgentClient) -> None:
    """One stream is opened and never read; the other goes on."""
    attempt = await next_attempt(agent)
    reader, writer = await asyncio.open_connection(agent.agent.host, 7117)
    writer.write(f"GET {STREAM_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-of-the-run\r\n\r\n".encode())
    await writer.drain()
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await agent.until(at_step(40, attempt))
    writer.close()
