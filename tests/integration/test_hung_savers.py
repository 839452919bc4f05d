"""A saver that hangs is replaced by its agent, whatever it hangs in; one whose store is slow is not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents_real import AgentClient
from mend.heartbeats import Heartbeat
from mend.orders import CheckpointPlan
from mend_trainer.procfs import GONE, look_at
from mend_trainer.stillness import TURN_SECONDS
from s3 import FaultyProxy, ministack
from saving_worker import a_worker, launch, pid_of_saver
from waiting import eventually

PLENTY_SECONDS = 4 * TURN_SECONDS


def committed(beat: Heartbeat | None) -> int:
    """The step of the newest checkpoint that was told of."""
    return beat.save.committed.step if beat is not None and beat.save and beat.save.committed else -1


def age(beat: Heartbeat | None) -> float:
    """Seconds since it was committed."""
    return beat.save.committed_age_seconds or 0.0 if beat is not None and beat.save else 0.0


def reached(client: AgentClient) -> int:
    """The step that all ranks have completed; none of them has ended."""
    beat = client.heartbeat
    assert beat is not None
    assert all(rank.exit is None for rank in beat.ranks)
    return min(rank.step for rank in beat.ranks)


def saver_of(client: AgentClient) -> int:
    """The process that saves."""
    pid = pid_of_saver(client.agent.pid)
    assert pid is not None
    return pid


async def test_a_saver_that_hangs_is_replaced_and_what_it_owed_is_committed(tmp_path: Path) -> None:
    """SIGSTOP to a saver: ranks train on, the agent says so, kills it, and another commits what was owed."""
    plan = CheckpointPlan(uri=f"file://{tmp_path}/run", interval_steps=5)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        await client.until(lambda beat: committed(beat) > 0, "a checkpoint")
        hung = saver_of(client)
        os.kill(hung, signal.SIGSTOP)
        stood = reached(client)
        await eventually(lambda: look_at(hung).state == GONE, "it is killed", PLENTY_SECONDS)
        told = [line for line in client.agent.output.splitlines() if "the saver hangs" in line]
        assert len(told) == 1
        assert "its loop has not turned for 3" in told[0]
        assert f"process {hung}, state T" in told[0]
        assert reached(client) > stood, "ranks went on meanwhile"
        await client.until(lambda beat: committed(beat) > stood, "another saver commits")
        assert saver_of(client) != hung


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A store before which a proxy can hold up what it likes."""
    with ministack(tmp_path / "server") as server, FaultyProxy(server) as running:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.credentials.access_key_id or "")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.credentials.secret_access_key or "")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield running


async def test_a_store_that_does_not_answer_is_no_hang(proxy: FaultyProxy, tmp_path: Path) -> None:
    """For longer than a saver may stand still every upload is held up: it is the same saver that commits afterwards."""
    plan = CheckpointPlan(uri=proxy.server.uri("run"), endpoint=proxy.server.endpoint, interval_steps=5)
    async with a_worker(tmp_path) as client:
        await launch(client, 1, plan)
        await client.until(lambda beat: committed(beat) > 0, "a checkpoint")
        saver = saver_of(client)
        proxy.stall(times=10_000, method="PUT")
        await eventually(lambda: age(client.heartbeat) > TURN_SECONDS + 5, "nothing is committed", PLENTY_SECONDS)
        before = committed(client.heartbeat)
        proxy.heal()
        await client.until(lambda beat: committed(beat) > before, "a checkpoint after all")
        assert saver_of(client) == saver
        assert "the saver hangs" not in client.agent.output
