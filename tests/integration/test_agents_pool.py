"""The pool of streams against agents that die, stall, come back late and lie."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

import fake_agent
from fake_agent import FakeAgent, a_heartbeat, a_rank, an_agent
from mend import link
from mend.agents import AgentPool, RunKey
from mend.backoff import Backoff
from mend.dial import AgentUnreachable, OrderRefused, Target, Unauthorized
from mend.evidence import Evidence, RankEvidence
from mend.heartbeats import AgentState, Point, Points, RankExit
from mend.observation import AgentView
from mend.orders import Ack, Gather, Stop
from mend.protocol import encode
from mend.spec import LossSpike
from waiting import eventually

RUN: RunKey = ("default", "clio")


class Listener:
    """What the pool tells its user."""

    def __init__(self) -> None:
        self.news: list[RunKey] = []
        self.points: list[tuple[int, tuple[Point, ...]]] = []
        self.pool = AgentPool(
            on_news=self.news.append, on_points=lambda run, attempt, points: self.points.append((attempt, points))
        )

    def view(self) -> AgentView:
        (view,) = self.pool.views(RUN)
        return view

    def has_heard(self, sequence: int) -> bool:
        heartbeat = self.view().heartbeat
        return heartbeat is not None and heartbeat.sequence == sequence


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    """A pool with ears, closed at the end."""
    listener = Listener()
    yield listener
    await listener.pool.close()
    assert listener.pool.health.crashes == 0


@pytest.fixture
async def agent() -> AsyncIterator[FakeAgent]:
    """One agent that listens."""
    async with an_agent() as agent:
        yield agent


async def test_a_heartbeat_becomes_a_view(listener: Listener, agent: FakeAgent) -> None:
    """Once connected, the newest heartbeat and its age are to be seen; connecting and the first heartbeat are news."""
    assert listener.pool.views(RUN) == ()
    listener.pool.update(RUN, [agent.target])
    assert listener.view().problem == "not connected yet"
    await eventually(lambda: listener.has_heard(1))
    view = listener.view()
    assert (view.worker, view.pod_uid, view.connected, view.problem) == (0, "pod-uid", True, "")
    assert 0 <= view.silent_seconds < 30
    assert listener.news == [RUN, RUN]
    assert listener.pool.connected() == 1


async def test_progress_is_seen_without_waking_anybody(listener: Listener, agent: FakeAgent) -> None:
    """Heartbeats that only tell of steps update the view silently; an exit wakes the controller."""
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    listener.news.clear()
    await agent.say(a_heartbeat(sequence=2, reports=(a_rank(0, 2, 0.25), a_rank(1, 2))))
    await eventually(lambda: listener.has_heard(2))
    assert listener.news == []
    assert listener.pool.step_times(RUN).seconds == (0.25,)
    await agent.say(a_heartbeat(sequence=3, reports=(a_rank(0, 2), a_rank(1, 2, exit=RankExit(signal=9)))))
    await eventually(lambda: listener.has_heard(3))
    assert listener.news == [RUN]


async def test_a_dead_agent_is_news_at_once_and_is_dialled_until_it_is_back(
    listener: Listener, agent: FakeAgent
) -> None:
    """The end of a stream shows as not connected, with the last heartbeat still there; a restarted agent is heard."""
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    listener.news.clear()
    await agent.stop()
    await eventually(lambda: not listener.view().connected)
    assert listener.news[0] == RUN
    await eventually(lambda: listener.view().problem == "refused")
    assert listener.view().heartbeat is not None
    agent.greeting = (a_heartbeat(agent_id="agent-2", attempt=0, sequence=0, state=AgentState.IDLE, ranks=0),)
    await agent.start()
    await eventually(lambda: listener.view().connected and listener.has_heard(0))


async def test_an_agent_that_is_not_up_yet_is_found_soon_after_it_listens(listener: Listener) -> None:
    """A new pod's agent is dialled so often that it is connected soon after it starts to listen."""
    agent = FakeAgent()
    await agent.start()
    await agent.stop()
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.view().problem == "refused" and listener.pool.health.failures >= 8)
    began = time.monotonic()
    await agent.start()
    await eventually(lambda: listener.view().connected)
    print(f"connected {1000 * (time.monotonic() - began):.0f} ms after it listens")
    await agent.stop()


async def test_a_container_that_starts_is_dialled_at_once(
    listener: Listener, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rarely an agent was dialled before, news of its container's start ends the wait."""
    monkeypatch.setattr(link, "DIAL_BACKOFF", Backoff(base_seconds=3600.0, ceiling_seconds=3600.0))
    await agent.stop()
    listener.pool.update(RUN, [replace(agent.target, started=False)])
    await eventually(lambda: listener.view().problem == "refused")
    await agent.start()
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))


async def test_an_agent_that_never_comes_is_dialled_ever_more_rarely(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the eager time, dials back off to one a second."""
    monkeypatch.setattr(link, "EAGER_SECONDS", 0.0)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        listener.pool.update(RUN, [Target(0, "pod-uid", "127.0.0.1", reserved.getsockname()[1], "t")])
        began = time.monotonic()
        await eventually(lambda: listener.pool.health.failures >= 7)
    assert time.monotonic() - began > (0.02 + 0.04 + 0.08 + 0.16 + 0.32 + 0.64) / 2 * 0.9


async def test_a_stalled_agent_stays_connected_and_grows_silent(listener: Listener, agent: FakeAgent) -> None:
    """A stopped process keeps its connection: it is connected, and the silence grows."""
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    await eventually(lambda: listener.view().silent_seconds > 0.5)
    assert listener.view().connected


async def test_a_stopped_process_grows_silent_and_a_killed_one_is_gone(listener: Listener) -> None:
    """SIGSTOP leaves the connection and a growing silence, SIGCONT ends it, SIGKILL ends the stream at once."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(fake_agent.__file__)), "0", "0.05", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        listener.pool.update(RUN, [Target(0, "pod-uid", "127.0.0.1", port, fake_agent.TOKEN)])
        await eventually(lambda: listener.view().heartbeat is not None)
        process.send_signal(signal.SIGSTOP)
        await eventually(lambda: listener.view().silent_seconds > 1.0)
        assert listener.view().connected
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: listener.view().silent_seconds < 0.5)
        assert listener.pool.health.streams == 1
        process.kill()
        await eventually(lambda: not listener.view().connected)
        await eventually(lambda: listener.view().problem == "refused")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_an_agent_that_accepts_and_never_answers_is_not_connected(
    listener: Listener, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the answer to a dial is bounded."""
    monkeypatch.setattr("mend.dial.HEADERS_SECONDS", 0.1)
    agent.stalls = True
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.view().problem == "timed out")
    agent.stalls = False
    await eventually(lambda: listener.has_heard(1))


@pytest.mark.parametrize(
    "lie",
    [
        b"not json\n",
        b'{"type":"gossip"}\n',
        b'{"type":"heartbeat","attempt":"one"}\n',
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"type":"heartbeat","x":' + b"[" * 100_000 + b"\n",
        b"x" * (link.LINE_LIMIT_BYTES + 1),
        encode(a_heartbeat(worker=7)) + b"\n",
    ],
    ids=["text", "unknown", "ill-typed", "binary", "nested", "nested-field", "endless", "other-worker"],
)
async def test_garbage_costs_the_stream_and_nothing_else(listener: Listener, agent: FakeAgent, lie: bytes) -> None:
    """Whatever an agent sends, only its own stream is closed; it is counted, told and dialled again."""
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    agent.greeting = (a_heartbeat(sequence=2),)
    await agent.say(lie)
    await eventually(lambda: listener.pool.health.garbage == 1)
    await eventually(lambda: listener.view().connected and listener.has_heard(2))


async def test_an_agent_that_only_lies_is_not_dialled_in_a_loop(listener: Listener, agent: FakeAgent) -> None:
    """A stream that ends at once counts as a failure: the dials slow down."""
    agent.greeting = (b"lies\n",)
    listener.pool.update(RUN, [agent.target])
    began = time.monotonic()
    await eventually(lambda: agent.dials >= 10)
    assert time.monotonic() - began > 0.15
    assert listener.view().problem.startswith("garbage") or listener.view().connected


async def test_the_wrong_token_is_told(listener: Listener) -> None:
    """An agent of another run lets nobody in: the view says so, and orders raise Unauthorized."""
    async with an_agent(token="of another run") as stranger:
        listener.pool.update(RUN, [stranger.target])
        await eventually(lambda: listener.view().problem.startswith("unauthorized"))
        with pytest.raises(Unauthorized, match="worker 0 of default/clio"):
            await listener.pool.send(RUN, 0, "pod-uid", Stop(attempt=1))


async def test_the_loss_is_measured_as_its_points_come(listener: Listener, agent: FakeAgent) -> None:
    """By the rule that was asked with last; another attempt's points say nothing of this one."""
    rule = LossSpike(window=16, points=3)
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    assert listener.pool.losses(RUN, 1, rule) is None
    curve = (*(Point(step=n, loss=3.0, tokens=1, seconds=0.1) for n in range(16)),)
    up = (*(Point(step=n, loss=9.0, tokens=1, seconds=0.1) for n in range(16, 20)),)
    await agent.say(Points(attempt=1, points=curve), Points(attempt=1, points=up))
    await eventually(lambda: (told := listener.pool.losses(RUN, 1, rule)) is not None and told.above == 4)
    assert listener.pool.losses(RUN, 2, rule) is None


async def test_what_is_older_than_the_run_is_dropped(listener: Listener, agent: FakeAgent) -> None:
    """After a fence, points, evidence and step times of earlier attempts are void; the heartbeat still shows."""
    agent.answer = lambda order: (200, encode(Evidence(attempt=order.attempt, worker=0, ranks=(RankEvidence(rank=0),))))
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    await listener.pool.send(RUN, 0, "pod-uid", Gather(attempt=1))
    await agent.say(a_heartbeat(sequence=2, reports=(a_rank(0, 2, 0.25),)))
    await eventually(lambda: listener.pool.step_times(RUN).seconds)
    assert [told.attempt for told in listener.pool.evidence(RUN)] == [1]

    listener.pool.fence(RUN, 2)
    assert listener.pool.evidence(RUN) == ()
    assert listener.pool.step_times(RUN).seconds == ()
    old, new = (Points(attempt=n, points=(Point(step=n, loss=1.0, tokens=1, seconds=0.1),)) for n in (1, 2))
    await agent.say(old, new, a_heartbeat(sequence=3, reports=(a_rank(0, 3, 0.25),)))
    await eventually(lambda: listener.has_heard(3))
    assert [attempt for attempt, _ in listener.points] == [2]
    assert listener.pool.step_times(RUN).seconds == ()
    await listener.pool.send(RUN, 0, "pod-uid", Gather(attempt=1))
    assert listener.pool.evidence(RUN) == ()
    assert listener.pool.health.stale == 1


async def test_an_agent_that_goes_back_in_attempts_is_not_believed(listener: Listener, agent: FakeAgent) -> None:
    """The same agent cannot return to an earlier attempt; the newest is kept."""
    agent.greeting = (a_heartbeat(attempt=3, sequence=5),)
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(5))
    await agent.say(a_heartbeat(attempt=2, sequence=6))
    await eventually(lambda: listener.pool.health.stale == 1)
    assert listener.has_heard(5)


async def test_update_is_level_triggered(listener: Listener, agent: FakeAgent) -> None:
    """Repeating the wanted set changes nothing; who is no longer wanted is hung up on; a new pod is another agent."""
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    listener.pool.update(RUN, [agent.target])
    assert listener.view().connected
    assert agent.dials == 1
    async with an_agent(worker=0) as replacement:
        target = Target(0, "new-uid", "127.0.0.1", replacement.port, replacement.token)
        listener.pool.update(RUN, [agent.target, target])
        await eventually(lambda: listener.pool.connected() == 2)
        listener.pool.update(RUN, [target])
        await eventually(lambda: not agent.streams)
        assert listener.view().pod_uid == "new-uid"
        listener.pool.forget(RUN)
        assert listener.pool.views(RUN) == ()
        await eventually(lambda: not replacement.streams)


async def test_orders_reach_the_agent_and_its_answer_comes_back(listener: Listener, agent: FakeAgent) -> None:
    """An order is acknowledged; a refusal raises with what the agent said."""
    listener.pool.update(RUN, [agent.target])
    stop = Stop(attempt=4, reason="recovery")
    assert await listener.pool.send(RUN, 0, "pod-uid", stop) == Ack(accepted=True, attempt=4)
    assert agent.orders == [stop]
    agent.answer = lambda order: (409, encode(Ack(accepted=False, attempt=9, reason="older attempt")))
    with pytest.raises(OrderRefused, match="attempt 9: older attempt") as refusal:
        await listener.pool.send(RUN, 0, "pod-uid", stop)
    assert refusal.value.ack == Ack(accepted=False, attempt=9, reason="older attempt")


@pytest.mark.parametrize("answer", [(200, b"<html>"), (500, b"oops"), (200, b"\xff"), (200, b'{"x":' + b"[" * 100_000)])
async def test_an_answer_that_is_none_is_refused(
    listener: Listener, agent: FakeAgent, answer: tuple[int, bytes]
) -> None:
    """Nonsense in answer to an order raises a named error, for acks and for evidence."""
    agent.answer = lambda order: answer
    listener.pool.update(RUN, [agent.target])
    for order in (Stop(attempt=1), Gather(attempt=1)):
        with pytest.raises(OrderRefused, match="no answer"):
            await listener.pool.send(RUN, 0, "pod-uid", order)


async def test_orders_reach_an_agent_that_came_back(listener: Listener, agent: FakeAgent) -> None:
    """A connection of before the restart is not used again: the first order after it arrives."""
    listener.pool.update(RUN, [agent.target])
    for _ in range(3):
        await listener.pool.send(RUN, 0, "pod-uid", Stop(attempt=1))
        await agent.stop()
        await agent.start()
    await listener.pool.send(RUN, 0, "pod-uid", Stop(attempt=1))
    assert len(agent.orders) == 4


async def test_orders_to_nobody_fail_within_their_time(listener: Listener, agent: FakeAgent) -> None:
    """A stalled agent, a dead one and a pod that is not known raise AgentUnreachable."""
    listener.pool.update(RUN, [agent.target])
    agent.stalls = True
    with pytest.raises(AgentUnreachable, match=r"no answer within 0\.2 s"):
        await listener.pool.send(RUN, 0, "pod-uid", Stop(attempt=1), timeout_seconds=0.2)
    await agent.stop()
    with pytest.raises(AgentUnreachable, match="refused"):
        await listener.pool.send(RUN, 0, "pod-uid", Stop(attempt=1))
    for worker, uid in ((0, "other-uid"), (5, "pod-uid")):
        with pytest.raises(AgentUnreachable, match="no agent"):
            await listener.pool.send(RUN, worker, uid, Stop(attempt=1))


async def test_a_broken_callback_does_not_silence_an_agent(agent: FakeAgent) -> None:
    """An exception in the user's callback is counted and logged, and the agent is heard again."""
    asked = 0

    def on_points(run: RunKey, attempt: int, points: tuple[Point, ...]) -> None:
        nonlocal asked
        asked += 1
        raise OSError("disk full")

    pool = AgentPool(on_points=on_points)
    try:
        pool.update(RUN, [agent.target])
        await eventually(lambda: agent.streams)
        await agent.say(Points(attempt=1, points=()))
        await eventually(lambda: asked == 1 and agent.dials == 2)
        assert pool.health.crashes == 1
    finally:
        await pool.close()


async def test_heartbeats_are_cheap(listener: Listener, agent: FakeAgent) -> None:
    """Prints the CPU seconds of this process for each heartbeat of 8 ranks, sender included."""
    listener.pool.update(RUN, [agent.target])
    await eventually(lambda: listener.has_heard(1))
    count = 2000
    reports = tuple(a_rank(rank, 5, loss=2.5, tokens=1_000_000, progress_seconds=0.01) for rank in range(8))
    lines = [encode(a_heartbeat(sequence=n, reports=reports)) + b"\n" for n in range(2, count + 2)]
    began = time.process_time()
    for line in lines:
        await agent.say(line)
        await asyncio.sleep(0)
    await eventually(lambda: listener.has_heard(count + 1))
    print(f"{1e6 * (time.process_time() - began) / count:.0f} us of CPU for a heartbeat, sending included")
    assert listener.pool.health.garbage == 0
